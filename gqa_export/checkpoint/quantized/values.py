"""The weights of a quantized folder as a state for transformers: quantized ones as their values."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from ..safetensors_header import StoredTensor

if TYPE_CHECKING:
    import torch

    from ...quantized.matrix import QuantizedMatrix
    from ..checkpoint import Checkpoint


def values_of(checkpoint: Checkpoint, dtype: str) -> dict[str, torch.Tensor]:
    """Every weight by the name it would be stored under if it were plain.

    Args:
        checkpoint: a folder with quantized weights.
        dtype: "float64": the exact values of quantized weights; any other: rounded once, to float32. Plain weights
            are as they are stored.
    """
    state = {name: plain_value(tensor) for name, tensor in checkpoint.tensors.items()}
    exact = dtype == "float64"
    return {**state, **{name: dequantized(matrix, exact) for name, matrix in checkpoint.quantized.items()}}


def dequantized(matrix: QuantizedMatrix, exact: bool = False) -> torch.Tensor:
    """A quantized weight's values as the model's parameter, float32 (exact: float64)."""
    import numpy as np
    import torch

    values: Any = np.empty((matrix.rows, matrix.columns), np.float64 if exact else np.float32)
    for start, stop in matrix.stripes():
        values[start:stop] = matrix.dequantize(start, stop)
    values = values.reshape(matrix.shape)
    return torch.from_numpy(np.ascontiguousarray(values.swapaxes(-1, -2)) if matrix.transposed else values)


def plain_value(tensor: StoredTensor) -> torch.Tensor:
    """A stored plain tensor, read."""
    import numpy as np
    import torch

    raw = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset)
    if not prod(tensor.shape):
        return torch.zeros(tensor.shape, dtype=getattr(torch, tensor.dtype))
    return torch.from_numpy(raw).view(getattr(torch, tensor.dtype)).reshape(tensor.shape)
