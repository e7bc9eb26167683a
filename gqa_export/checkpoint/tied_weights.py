"""Whether weights that a configuration ties are one: the stored tensors decide, as they do in transformers.

`from_pretrained` does not tie two tensors that a checkpoint stores with different values, whatever config.json says
(transformers, `PreTrainedModel.tie_weights`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UnsupportedModel
from .checkpoint import Checkpoint
from .pickle_weights import read_pickles
from .safetensors_header import StoredTensor

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 20


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
    """
    there: list[Any] = [checkpoint.tensors[name] for name in group if name in checkpoint.tensors]
    if checkpoint.model is not None or checkpoint.pickles:
        state = checkpoint.model.state_dict() if checkpoint.model is not None else read_pickles(checkpoint.pickles)
        there = [state[name] for name in group if name in state]
    return any(_differ(there[0], other) for other in there[1:])


def _differ(one: Any, other: Any) -> bool:
    if tuple(one.shape) != tuple(other.shape):
        return True
    if isinstance(one, StoredTensor):
        return any(not np.array_equal(a, b) for a, b in zip(_chunks(one), _chunks(other), strict=True))
    import torch

    if one.data_ptr() == other.data_ptr():
        return False
    wide = torch.promote_types(one.dtype, other.dtype)
    return not torch.equal(one.to(wide), other.to(wide))


def _chunks(tensor: StoredTensor) -> Iterator[np.ndarray[Any, Any]]:
    """The values in pieces of CHUNK_ELEMENTS; bfloat16 and float16 exactly as float32."""
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, tensor.dtype, None) or tensor.dtype)
    left = tensor.nbytes // dtype.itemsize
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset)
        while left:
            count = min(left, CHUNK_ELEMENTS)
            left -= count
            values = np.frombuffer(file.read(count * dtype.itemsize), dtype)
            yield values.astype(np.float32) if dtype.itemsize < 4 else values
