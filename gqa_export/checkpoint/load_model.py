"""A checkpoint -> transformers configuration, weightless skeleton, or loaded causal language model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import GqaExportError
from .gguf_header import GgufHeader, read_gguf_header
from .gguf_reader_patch import quick_gguf
from .pickle_weights import read_pickles
from .refusals import FIX_DECODER, refuse_config, refuse_modules

if TYPE_CHECKING:
    import torch
    import transformers

    from .checkpoint import Checkpoint

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}


@contextmanager
def quiet() -> Iterator[list[str]]:
    """No progress bars, load reports or warnings of transformers: they are collected in the list instead.

    Its settings are restored afterwards.
    """
    from transformers.utils import logging as hf

    said: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity(logging.WARNING)
    hf.disable_default_handler()
    hf.add_handler(listener)
    hf.disable_progress_bar()
    try:
        yield said
    finally:
        hf.remove_handler(listener)
        hf.enable_default_handler()
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()


def load_config(checkpoint: Checkpoint, **overrides: Any) -> transformers.PretrainedConfig:
    """The configuration with `overrides` set. Lists with one value a layer follow `num_hidden_layers`.

    Raises GqaExportError for an architecture that transformers does not know as a causal language model, and for
    what `refuse_config` refuses. KeyError for an override that the configuration does not have.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = checkpoint.config.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        remote = ", and code that comes with a checkpoint is not run" if checkpoint.config.get("auto_map") else ""
        raise GqaExportError(f"unknown architecture: transformers has no model_type {model_type!r}{remote}",
                             checkpoint.source, "upgrade transformers, or correct model_type in config.json")
    try:
        with quiet():
            config = AutoConfig.for_model(**checkpoint.config) if checkpoint.kind == "gguf" else \
                AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged config.json makes transformers raise
        raise GqaExportError(f"transformers cannot read config.json: {_first_line(error)}", checkpoint.source,
                             "correct the file, or download it again") from error
    _check_architecture(config, checkpoint.source)
    refuse_config(config, checkpoint.source, checkpoint.text_only)
    return _override(config, overrides)


def _check_architecture(config: transformers.PretrainedConfig, where: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    known = {name for value in CAUSAL.values() for name in ([value] if isinstance(value, str) else value)}
    named = list(config.architectures or [])
    if named and not known.intersection(named):
        raise GqaExportError(f"{named[0]} is not a causal language model with a head", where, FIX_DECODER)
    if config.model_type not in CAUSAL:
        raise GqaExportError(f"transformers has no causal language model of type {config.model_type!r}", where,
                             FIX_DECODER)


def _override(config: transformers.PretrainedConfig, overrides: dict[str, Any]) -> transformers.PretrainedConfig:
    depth, wanted = getattr(config, "num_hidden_layers", None), overrides.get("num_hidden_layers")
    for name, value in overrides.items():
        if not hasattr(config, name):
            raise KeyError(f"the configuration {type(config).__name__} has no {name!r}")
        setattr(config, name, value)
    if depth and wanted and wanted < depth:
        for name, value in list(vars(config).items()):
            if isinstance(value, (list, tuple)) and len(value) == depth and name not in overrides:
                setattr(config, name, value[:wanted])
    return config


def load_skeleton(checkpoint: Checkpoint, **config_overrides: Any) -> torch.nn.Module:
    """The model on the meta device: structure, shapes and scalars of every layer, no weights; refusals applied."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(checkpoint, **config_overrides)
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    refuse_modules(model, checkpoint.source, checkpoint.text_only)
    return model.eval()


def load_model(checkpoint: Checkpoint, dtype: str = "auto", *, attn_implementation: str = "eager",
               **config_overrides: Any) -> torch.nn.Module:
    """The model in eval mode. safetensors stay memory-mapped where no conversion is needed.

    dtype: "auto" (as stored), or a torch name or fp32 | fp16 | bf16 | fp64. Refuses, by name, tensors that the
    checkpoint lacks or has in another shape (tied ones excepted), and the layers that `refuse_modules` refuses.
    """
    import torch
    from transformers import AutoModelForCausalLM

    name = checkpoint.stored_dtype if dtype == "auto" else DTYPES.get(dtype, dtype)
    config = load_config(checkpoint, **config_overrides)
    kwargs: dict[str, Any] = {"dtype": getattr(torch, name), "attn_implementation": attn_implementation,
                              "experts_implementation": "batched_mm", "ignore_mismatched_sizes": True,
                              "output_loading_info": True}
    said: list[str] = []
    try:
        with quiet() as said:
            if checkpoint.gguf_file is not None:
                model_class, state = _gguf_state(*_identity(checkpoint.gguf_file))
                loaded = model_class.from_pretrained(None, config=config, state_dict=dict(state), **kwargs)
            elif checkpoint.pickles:
                from transformers.models.auto.auto_factory import _get_model_class

                model_class = _get_model_class(config, AutoModelForCausalLM._model_mapping)
                loaded = model_class.from_pretrained(None, config=config, state_dict=read_pickles(checkpoint.pickles),
                                                     **kwargs)
            else:
                loaded = AutoModelForCausalLM.from_pretrained(
                    checkpoint.folder, config=config, local_files_only=True, trust_remote_code=False,
                    use_safetensors=True, **kwargs)
    except GqaExportError:
        raise
    except Exception as error:  # transformers raises anything between OSError and AttributeError here
        unmerged = re.findall(r"destined for ([\w.]+\w)", "\n".join(said))
        if unmerged:
            raise GqaExportError(f"the checkpoint lacks parts of {_some(sorted(set(unmerged)))}", checkpoint.source,
                                 "download the checkpoint again") from error
        raise GqaExportError(f"transformers cannot load the model: {_first_line(error)}", checkpoint.source,
                             "check that config.json and the weights belong together") from error
    model, info = cast("tuple[Any, dict[str, Any]]", loaded)
    _refuse_incomplete(info, checkpoint.source)
    refuse_modules(model, checkpoint.source, checkpoint.text_only)
    return model.eval()


def _refuse_incomplete(info: dict[str, Any], where: str) -> None:
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    fix = "download the checkpoint again; config.json and the weights must belong together"
    if missing:
        raise GqaExportError(f"the checkpoint lacks {_some(missing)}", where, fix)
    if mismatched:
        shapes = [f"{name} {tuple(stored)} instead of {tuple(wanted)}" for name, stored, wanted in mismatched]
        raise GqaExportError(f"tensors of another shape than config.json asks for: {_some(shapes)}", where, fix)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _identity(path: Path) -> tuple[str, int]:
    return str(path.resolve()), path.stat().st_mtime_ns


@lru_cache(maxsize=1)
def _gguf_facts(path: str, mtime_ns: int) -> tuple[transformers.PretrainedConfig, GgufHeader]:
    from transformers import AutoConfig

    header = read_gguf_header(Path(path))
    try:
        # a file that does not say its vocabulary size has it in the list of tokens alone
        with quiet(), quick_gguf(vocabulary=header.about_model("vocab_size") is None):
            config = AutoConfig.from_pretrained(Path(path).parent, gguf_file=Path(path).name, local_files_only=True)
    except Exception as error:
        raise GqaExportError(f"transformers cannot read this GGUF architecture ({header.architecture}): "
                             f"{_first_line(error)}", path, "give the original Hugging Face checkpoint") from error
    return config, header


def gguf_config(path: Path) -> dict[str, Any]:
    """The configuration in a GGUF file, refused where the file says more than transformers takes from it."""
    parsed, header = _gguf_facts(*_identity(path))
    config = parsed.to_dict()
    rope = (config.get("rope_parameters") or {}).get("rope_type", "default")
    said = header.about_model("rope.scaling.type")
    lost = []
    if ((said not in (None, "none")) or "rope_freqs.weight" in header.tensors) and rope == "default":
        lost.append("its rotary scaling")
    if header.about_model("attention.sliding_window") and not config.get("sliding_window"):
        lost.append("its attention window")
    if header.about_model("attn_logit_softcapping") and not config.get("attn_logit_softcapping"):
        lost.append("its attention softcap")
    if lost:
        raise GqaExportError(f"transformers drops {' and '.join(lost)} when it reads this GGUF file", str(path),
                             "give the original Hugging Face checkpoint: the exported model would be wrong")
    return config


@lru_cache(maxsize=1)
def _gguf_state(path: str, mtime_ns: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """Model class and all weights, dequantized to float32 (or as stored). Once per process: it takes half a minute."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    config, header = _gguf_facts(path, mtime_ns)
    with quick_gguf(vocabulary=False):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            Path(path).parent, gguf_file=Path(path).name, config=config, dtype=getattr(torch, header.stored_dtype),
            local_files_only=True, output_loading_info=True, quantization_config=GgufConfig(dequantize=True))
    model, info = loaded
    _refuse_incomplete(info, path)
    return type(model), model.state_dict()
