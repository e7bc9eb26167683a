"""A checkpoint -> its weightless skeleton, or the loaded causal language model."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import GqaExportError, InvalidCheckpoint, cause_of
from ..spec import FLOATS
from .building import building, without_absent_parts
from .checkpoint import Checkpoint
from .gguf_config import gguf_facts, identity
from .gguf_tensors import gguf_plain, gguf_state
from .load_config import load_config
from .lora import merge_into
from .memory_model import model_of
from .pickle_weights import read_pickles
from .quantized.values import values_of
from .quiet import quiet
from .refusals import refuse_modules

if TYPE_CHECKING:
    import torch
    import transformers


def load_skeleton(checkpoint: Checkpoint, **config_overrides: Any) -> torch.nn.Module:
    """The model on the meta device: structure, shapes and scalars of every layer, no weights; refusals applied."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(checkpoint, **config_overrides)
    with quiet(), torch.device("meta"), building(config):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    refuse_modules(model, checkpoint.source, checkpoint.text_only)
    return model.eval()


def load_model(checkpoint: Checkpoint, dtype: str = "auto", *, attn_implementation: str = "eager",
               **config_overrides: Any) -> torch.nn.Module:
    """The model with its weights, in eval mode. safetensors stay memory-mapped where they are not converted.

    Args:
        checkpoint: an opened checkpoint.
        dtype: "auto" (as stored; quantized weights as float32), a torch name, or fp32 | fp16 | bf16 | fp64. fp64 has
            quantized weights exactly.
        attn_implementation: transformers' name of the attention to use.
        **config_overrides: see `load_config`.

    Raises:
        InvalidCheckpoint: tensors are missing or have another shape (tied ones excepted), or transformers cannot load
            the files.
        UnsupportedModel: what `load_config` and `refuse_modules` refuse.
    """
    import torch
    from transformers import AutoModelForCausalLM

    name = checkpoint.stored_dtype if dtype == "auto" else FLOATS.get(dtype, dtype)
    config = load_config(checkpoint, **config_overrides)
    if checkpoint.model is not None:
        return model_of(checkpoint, name, config, attn_implementation)
    kwargs: dict[str, Any] = {"dtype": getattr(torch, name), "attn_implementation": attn_implementation,
                              "experts_implementation": "batched_mm", "ignore_mismatched_sizes": True,
                              "output_loading_info": True}
    messages: list[str] = []
    try:
        with quiet() as messages, without_absent_parts(config):
            if checkpoint.gguf_file is not None:
                loaded = _from_state(config, dict(_gguf_state(identity(checkpoint.gguf_file), checkpoint.gguf_file,
                                                              name == "float64")), kwargs)
            elif checkpoint.quantized:
                loaded = _from_state(config, values_of(checkpoint, name), kwargs)
            elif checkpoint.pickles:
                loaded = _from_state(config, read_pickles(checkpoint.pickles), kwargs)
            else:
                loaded = AutoModelForCausalLM.from_pretrained(
                    checkpoint.folder, config=config, local_files_only=True, trust_remote_code=False,
                    use_safetensors=True, **kwargs)
    except GqaExportError:
        raise
    except Exception as error:  # transformers raises anything between OSError and AttributeError here
        unmerged = re.findall(r"destined for ([\w.]+\w)", "\n".join(messages))
        if unmerged:
            raise InvalidCheckpoint(f"the checkpoint lacks parts of {some(sorted(set(unmerged)))}", checkpoint.source,
                                    "download the checkpoint again", code="E-CKPT-TENSORS-MISSING") from error
        raise InvalidCheckpoint(f"transformers cannot load the model: {cause_of(error)}", checkpoint.source,
                                "check that config.json and the weights belong together",
                                code="E-CKPT-LOAD") from error
    model, info = cast("tuple[Any, dict[str, Any]]", loaded)
    _refuse_incomplete(info, checkpoint.source)
    refuse_modules(model, checkpoint.source, checkpoint.text_only)
    if checkpoint.adapter is not None:
        merge_into(model, checkpoint.adapter)
    return model.eval()


def plain_values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights of a quantized GGUF file that are not quantized, under transformers' names; {} for other
    checkpoints, whose `tensors` are those."""
    if checkpoint.gguf_file is None or not checkpoint.quantized:
        return {}
    packed = frozenset(name for matrix in checkpoint.quantized.values() for name in matrix.tensors)
    return gguf_plain(gguf_facts(checkpoint.gguf_file), packed)


def _from_state(config: transformers.PretrainedConfig, state: dict[str, torch.Tensor],
                kwargs: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.auto_factory import _get_model_class

    model_class = _get_model_class(config, AutoModelForCausalLM._model_mapping)
    return model_class.from_pretrained(None, config=config, state_dict=state, **kwargs)


def _refuse_incomplete(info: dict[str, Any], where: str) -> None:
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    fix = "download the checkpoint again; its configuration and its weights must belong together"
    if missing:
        raise InvalidCheckpoint(f"the checkpoint lacks {some(missing)}", where, fix, code="E-CKPT-TENSORS-MISSING")
    if mismatched:
        shapes = [f"{name} {tuple(stored)} instead of {tuple(wanted)}" for name, stored, wanted in mismatched]
        raise InvalidCheckpoint(f"tensors do not have the shape that the configuration requires: {some(shapes)}", where,
                                fix, code="E-CKPT-TENSORS-SHAPE")


def some(names: list[str]) -> str:
    """The first three of these names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@lru_cache(maxsize=1)
def _gguf_state(files: tuple[tuple[str, int], ...], path: Path, exact: bool) -> dict[str, torch.Tensor]:
    """All weights, dequantized to float32 (or as stored), exact: to float64. Once per process: it takes seconds and
    much memory."""
    return gguf_state(gguf_facts(path), exact)
