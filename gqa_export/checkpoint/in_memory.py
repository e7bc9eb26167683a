"""A transformers model that a program holds in memory, taken as a checkpoint.

Everything but the weights is written into a temporary folder as `save_pretrained` would write it, so that an export
reads the same configuration, generation settings and tokenizer files as from a saved folder. The weights are the
module's own `state_dict`; nothing of them is copied or written.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModel
from ..files.read_json import read_json
from ..files.scratch import scratch_folder
from .checkpoint import Checkpoint
from .load_model import load_skeleton
from .quiet import quiet
from .refusals import LEFT_OVER, refuse_codes, refuse_raw_config, without_left_over

if TYPE_CHECKING:
    import transformers


@contextmanager
def memory_checkpoint(model: transformers.PreTrainedModel,
                      tokenizer: transformers.PreTrainedTokenizerBase | None = None, *,
                      text_only: bool = False) -> Iterator[Checkpoint]:
    """A checkpoint over a model in memory, valid inside the block. The model is neither changed nor kept.

    Args:
        model: a causal language model of transformers, on any device, in training mode or not.
        tokenizer: written beside the configuration; None: the bundle takes and gives token ids only.
        text_only: of a multimodal model the language model alone is meant.

    Raises:
        UnsupportedModel: for anything else than a transformers model, weights that are not there (meta device,
            offloaded), adapters, quantized or replaced modules: what the configuration does not describe would be lost.
    """
    where = f"the {type(model).__name__} in memory"
    _refuse(model, where)
    config: Any = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    with scratch_folder("model") as folder, quiet():
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        values, method = without_left_over(read_json(folder / "config.json"))
        if method:
            refuse_codes({name: str(tensor.dtype) for name, tensor in model.state_dict().items()}, method, where)
        refuse_raw_config(values, where, text_only)
        notes = (LEFT_OVER.format(file="config.json", method=method),) if method else ()
        checkpoint = Checkpoint(where, folder, "hf", None, values, _dtype(model, where), model=model,
                                text_only=text_only, notes=notes)
        _refuse_other_structure(model, checkpoint)
        yield checkpoint


def _dtype(model: transformers.PreTrainedModel, where: str) -> str:
    """The floating type that most bytes of the parameters have."""
    sizes: Counter[str] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel() * parameter.element_size()
    if not sizes:
        raise UnsupportedModel("the model has no floating point parameters", where,
                               "give a model with unquantized weights", code="E-MODEL-QUANTIZED")
    return sizes.most_common(1)[0][0]


def _refuse(model: Any, where: str) -> None:
    import torch
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(f"expected a transformers model or a checkpoint, got {type(model).__name__}", where,
                               "give a PreTrainedModel (of a PEFT model: model.merge_and_unload()), a folder, a hub id "
                               "or a .gguf file", code="E-MODEL-KIND")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModel("the model has adapters loaded, which its configuration does not describe", where,
                               "merge them into the weights first (peft: merge_and_unload)", code="E-MODEL-ADAPTERS")
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModel("the model is quantized", where, "load it without quantization, and quantize the "
                               "exported model afterwards", code="E-MODEL-QUANTIZED")
    absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if absent:
        raise UnsupportedModel(f"the weights of {absent[0]} are not in memory (meta device or offloaded)", where,
                               "load the model whole, without device_map or offloading", code="E-MODEL-META")
    for name, module in model.named_modules():
        if "forward" in vars(module) and isinstance(module, torch.nn.Module):
            raise UnsupportedModel(f"the forward method of {name or 'the model'} was replaced; an export is made from "
                                   "the configuration and would lose that", where, "restore it, or load the model "
                                   "without device_map (accelerate replaces forward methods)", code="E-MODEL-PATCHED")


def _refuse_other_structure(model: transformers.PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse a model whose parameters are not those that its configuration asks for."""
    expected = {name: tuple(tensor.shape) for name, tensor in load_skeleton(checkpoint).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UnsupportedModel(
                f"the model is not what its configuration describes: {name} has shape {found.get(name, 'none')}, the "
                f"configuration asks for {expected.get(name, 'none')}", checkpoint.source,
                "correct model.config, or undo the change of the modules", code="E-MODEL-STRUCTURE")
