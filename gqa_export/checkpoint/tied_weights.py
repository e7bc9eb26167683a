"""Whether weights that a configuration ties are one: the stored tensors decide, as they do in transformers.

`from_pretrained` does not tie two tensors that a checkpoint stores with different values, whatever config.json says
(transformers, `PreTrainedModel.tie_weights`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import InvalidCheckpoint, UnsupportedModel
from .checkpoint import Checkpoint
from .pickle_weights import read_pickles
from .same_weights import differ

if TYPE_CHECKING:
    import torch


def tied(model: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of parameter names that are one tensor, in the model's order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def untie(config: Any) -> None:
    """Give the model of a transformers configuration a head of its own."""
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def refuse_tied(checkpoint: Checkpoint, groups: Iterable[tuple[str, ...]]) -> None:
    """Refuse tensors that are stored with different values and are one in the model, whatever its configuration says.

    Raises:
        UnsupportedModel: names them.
    """
    if still := [group for group in groups if stored_apart(checkpoint, group)]:
        raise UnsupportedModel(f"the checkpoint stores different values for {' and '.join(still[0])}, which are "
                               "one weight in this model", checkpoint.source,
                               "check that config.json and the weights belong together", code="E-MODEL-TIED")


def stored_apart(checkpoint: Checkpoint, group: tuple[str, ...]) -> bool:
    """Whether the checkpoint stores tensors of different values under these names, of which it may lack some.

    Values are compared as they are stored: a head that equals the embedding only after rounding is another head.

    Raises:
        InvalidCheckpoint: their shapes differ.
    """
    stored: Any = {**checkpoint.tensors, **checkpoint.quantized} if checkpoint.gguf_file is None else {}
    if checkpoint.model is not None or checkpoint.pickles:
        stored = checkpoint.model.state_dict() if checkpoint.model is not None else read_pickles(checkpoint.pickles)
    there = {name: stored[name] for name in group if name in stored}
    if len({tuple(tensor.shape) for tensor in there.values()}) > 1:
        shapes = " and ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in there.items())
        raise InvalidCheckpoint(f"the checkpoint stores {shapes}, which are one weight of one shape in this model",
                                checkpoint.source, "check that config.json and the weights belong together",
                                code="E-CKPT-TENSORS-SHAPE")
    first, *others = there.values() if there else [None]
    if any(name in checkpoint.quantized for name in there):
        return any(_codes_differ(checkpoint, first, other) for other in others)
    return any(differ(first, other) for other in others)


def _codes_differ(checkpoint: Checkpoint, one: Any, other: Any) -> bool:
    """Whether two weights of which one is quantized are stored otherwise than with equal tensors."""
    parts = [[checkpoint.packed[name] for name in getattr(each, "tensors", ())] for each in (one, other)]
    return len(parts[0]) != len(parts[1]) or one.label != other.label or any(
        first.dtype != second.dtype or differ(first, second) for first, second in zip(*parts))
