"""Whether weights that a folder stores twice are the same: tied ones, tensors in two shards, a file beside an index.

Which of two copies is read differs between programs, so a checkpoint with different copies is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InvalidCheckpoint
from .safetensors_header import StoredTensor

if TYPE_CHECKING:
    import numpy as np

CHUNK_ELEMENTS = 1 << 20
FIX = "remove or rename the copy that is out of date"


def differ(one: Any, other: Any) -> bool:
    """Whether two tensors (`StoredTensor`, or two of PyTorch) have different shapes or values.

    Values are compared as they are stored: two that are equal only after rounding differ.
    """
    if tuple(one.shape) != tuple(other.shape):
        return True
    if isinstance(one, StoredTensor):
        import numpy as np

        return any(not np.array_equal(a, b) for a, b in zip(_chunks(one), _chunks(other), strict=True))
    import torch

    if one.data_ptr() == other.data_ptr():
        return False
    wide = torch.promote_types(one.dtype, other.dtype)
    return not torch.equal(one.to(wide), other.to(wide))


def refuse_twice(name: str, one: Any, other: Any, files: tuple[str, str], where: str) -> None:
    """Refuse a tensor that two files store with different values.

    Raises:
        InvalidCheckpoint: they differ; names the tensor and both files.
    """
    if differ(one, other):
        raise InvalidCheckpoint(f"{files[0]} and {files[1]} store different values for {name}", where, FIX,
                                code="E-CKPT-TENSOR-TWICE")


def refuse_two_checkpoints(single: Mapping[str, Any], shards: Mapping[str, Any], files: tuple[str, str],
                           where: str, *, part: bool = False) -> None:
    """Refuse a single file and a set of shards that are not the same weights.

    Args:
        single: tensors of the file by name. shards: those of the shards.
        files: names of the file and of the index.
        where: the folder.
        part: shards are missing; those that are there have to be a part of the file.

    Raises:
        InvalidCheckpoint: they differ; names the first tensor that does.
    """
    missing = sorted(shards.keys() - single.keys()) or ([] if part else sorted(single.keys() - shards.keys()))
    wrong = next((name for name in sorted(shards) if name in single and differ(single[name], shards[name])), "")
    if missing or wrong:
        holds = f"{wrong} differs" if wrong else f"{missing[0]} is in one of them only"
        raise InvalidCheckpoint(f"the folder holds two checkpoints: {files[0]} and the shards of {files[1]} ({holds})",
                                where, f"{FIX} (transformers reads {files[0]})", code="E-CKPT-TWO-CHECKPOINTS")


def _chunks(tensor: StoredTensor) -> Iterator[np.ndarray[Any, Any]]:
    """The values in pieces of CHUNK_ELEMENTS; bfloat16 and float16 exactly as float32."""
    import ml_dtypes
    import numpy as np

    dtype = np.dtype(getattr(ml_dtypes, tensor.dtype, None) or tensor.dtype)
    left = tensor.nbytes // dtype.itemsize
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset)
        while left:
            count = min(left, CHUNK_ELEMENTS)
            left -= count
            values = np.frombuffer(file.read(count * dtype.itemsize), dtype)
            yield values.astype(np.float32) if dtype.itemsize < 4 else values
