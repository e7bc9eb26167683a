"""Scales as checkpoints store them: one for all, one a row, one a group of a row, or one a rectangle of the matrix."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..safetensors_header import StoredTensor
from .stored import E4M3, E8M0, Rows, Stored, floats

Array = Any
"""a numpy array"""
MX_BLOCK = 32
"""columns that share an exponent in the OCP microscaling formats (MXFP8, MXFP4)"""


class Scales(NamedTuple):
    """How to read scales.

    Attributes:
        read: (start, stop) -> float32 `[rows, blocks]`.
        block: columns that share one.
        row_block: rows that share one.
        dtype: see `QuantizedMatrix.scale_dtype`.
        powers: all are powers of two.
    """

    read: Rows
    block: int
    row_block: int = 1
    dtype: str = "float32"
    powers: bool = False


def held_in(tensor: StoredTensor) -> str:
    """The smallest type that holds every number of these scales; exponents alone are numbers of bfloat16."""
    if tensor.dtype in ("uint8", E8M0):
        return "bfloat16"
    return tensor.dtype if tensor.dtype in ("float16", "bfloat16", E4M3) else "float32"


def scales_of(stored: Stored, name: str, tensor: StoredTensor, shape: tuple[int, ...], *, group: int = 0,
              rectangle: tuple[int, int] | None = None) -> Scales:
    """The scales of a weight.

    Args:
        stored: for refusals.
        name: of the tensor.
        tensor: with the scales.
        shape: of the weight, `[N, K]` or `[E, N, K]`.
        group: columns that share a scale, where a description has it; 0: the shape of the tensor tells.
        rectangle: (rows, columns) that share a scale, where scales are stored for those.

    Raises:
        InvalidCheckpoint: the shape of the tensor is not one of these.
    """
    found = _scales(stored, name, tensor, shape, group, rectangle)
    return found._replace(powers=tensor.dtype in ("uint8", E8M0))


def _scales(stored: Stored, name: str, tensor: StoredTensor, shape: tuple[int, ...], group: int,
            rectangle: tuple[int, int] | None) -> Scales:
    """As `scales_of`."""
    rows, columns = prod(shape[:-1]), shape[-1]
    mx = columns % MX_BLOCK == 0 and tensor.shape == (*shape[:-1], columns // MX_BLOCK)
    if mx and tensor.dtype in ("uint8", E8M0):  # scales of rectangles have fewer rows, whatever a description says
        group, rectangle = MX_BLOCK, None
    if rectangle is not None and prod(tensor.shape) != 1:
        return _rectangles(stored, name, tensor, shape, rectangle)
    if prod(tensor.shape) == 1:
        value = floats(tensor).reshape(1, 1)
        return Scales(lambda start, stop: np.repeat(value, stop - start, axis=0), columns, rows,
                      held_in(tensor))
    if tensor.shape in ((rows,), (*shape[:-1], 1)) and group in (0, -1, columns):
        return Scales(lambda start, stop: floats(tensor).reshape(-1, 1)[start:stop], columns, 1, held_in(tensor))
    if tensor.shape[:-1] != shape[:-1]:
        raise stored.shape(name, f"which are not scales of a weight {shape}")
    blocks = tensor.shape[-1]
    block = group if group > 0 else -(-columns // blocks)
    if -(-columns // block) != blocks or (group <= 0 and columns % blocks):
        raise stored.shape(name, f"which are not scales of {block} columns each for a weight {shape}")
    flat = StoredTensor(tensor.path, tensor.offset, tensor.nbytes, tensor.dtype, (rows, blocks))
    return Scales(lambda start, stop: floats(flat, slice(start, stop)), min(block, columns), 1, held_in(tensor))


def _rectangles(stored: Stored, name: str, tensor: StoredTensor, shape: tuple[int, ...],
                rectangle: tuple[int, int]) -> Scales:
    """Scales of rectangles; those at the right and lower edge may be smaller."""
    (high, wide), rows, columns = rectangle, shape[-2], shape[-1]
    expected = (*shape[:-2], -(-rows // high), -(-columns // wide))
    if tuple(size for size in tensor.shape if size != 1) != tuple(size for size in expected if size != 1):
        raise stored.shape(name, f"expected {expected} for a weight {shape} in blocks of {high} x {wide}")
    flat = StoredTensor(tensor.path, tensor.offset, tensor.nbytes, tensor.dtype, (prod(expected[:-1]), expected[-1]))

    def read(start: int, stop: int) -> Array:
        row = np.arange(start, stop)
        return floats(flat)[row // rows * expected[-2] + row % rows // high]

    return Scales(read, min(wide, columns), min(high, rows), held_in(tensor))
