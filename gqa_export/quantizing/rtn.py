"""Rounding to nearest with the scale of each block searched for: the smallest squared error, weighted by how large the
layer's inputs are where they are known.

For codes c the best scale of a block w is (h w c) / (h c c), and the error is then h w w - (h w c)^2 / (h c c): so the
search needs no residual. Scales are numbers of float16, so that a file with such scales loses nothing more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import UnsupportedModel
from ..quantized.matrix import QuantizedMatrix, Stripe

Array = Any
"""a numpy array"""
FACTORS = {8: tuple(1 + 0.01 * step for step in range(8)), 4: tuple(0.6 + 0.04 * step for step in range(14)),
           2: tuple(0.3 + 0.06 * step for step in range(16))}
"""bits -> the largest code's part of the block's largest number: what is tried. With 8 bits clipping does not pay, but
where the numbers of a block lie between codes differs from scale to scale by luck: a sixth less squared error"""
PIECE = 1 << 16
"""numbers quantized at once: they stay in the processor's cache"""


def quantize_matrix(rows: Callable[[int, int], Array], shape: tuple[int, ...], bits: int, block: int, label: str,
                    importance: Array | None = None, positive: bool = False, *,
                    transposed: bool = False) -> QuantizedMatrix:
    """A matrix to be quantized while it is read.

    Args:
        rows: (start, stop) -> these rows as floating-point numbers `[rows, K]`.
        shape: `[N, K]`, or `[E, N, K]` of experts, whose rows are counted through.
        bits: 2, 4 or 8.
        block: columns that share a scale.
        label: what the values are quantized from, for people.
        importance: `[K]`, how much an error of each column counts; None: all the same.
        positive: no scale is below 0 (`Target.positive_scales`).
        transposed: the model's parameter has each expert as `[K, N]`.
    """
    block = min(block, shape[-1])

    def read(start: int, stop: int) -> Stripe:
        return quantize_rows(rows(start, stop), bits, block, label, importance, positive)

    return QuantizedMatrix(shape, bits, block, "int", "none", label, read, scale_dtype="float16",
                           transposed=transposed)


def quantize_rows(values: Array, bits: int, block: int, name: str, importance: Array | None = None,
                  positive: bool = False) -> Stripe:
    """Quantize rows `[rows, K]`. Arguments as of `quantize_matrix`.

    Raises:
        UnsupportedModel: a value is not finite, or a block's scale does not fit float16.
    """
    count, columns = values.shape
    blocks = -(-columns // block)
    codes, scales = np.empty((count, columns), np.int8), np.empty((count, blocks), np.float32)
    step = max(1, PIECE // max(columns, 1))
    weight = None if importance is None else by_block(importance[None].astype(np.float32), block, blocks)
    for start in range(0, count, step):
        piece = values[start : start + step].astype(np.float32, copy=False)
        across = by_block(piece, block, blocks)  # [block, rows * blocks]: sums over a block are sums of whole rows
        repeated = None if weight is None else np.tile(weight, (1, len(piece)))
        scale, found = _search(across, bits, repeated, name, positive)
        scales[start : start + step] = scale.reshape(len(piece), blocks)
        codes[start : start + step] = found.T.reshape(len(piece), blocks * block)[:, :columns]
    return Stripe(codes, scales)


def by_block(rows: Array, block: int, blocks: int) -> Array:
    """`[rows, K]` -> `[block, rows * blocks]`, columns that are missing in the last block 0."""
    missing = blocks * block - rows.shape[1]
    if missing:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    return np.ascontiguousarray(rows.reshape(-1, block).T)


def _search(values: Array, bits: int, importance: Array | None, name: str, positive: bool) -> tuple[Array, Array]:
    """Scales `[blocks]` and codes int8 `[block, blocks]` of `values` `[block, blocks]`."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    least, most = values.min(axis=0), values.max(axis=0)
    extreme = np.where(most > -least, most, least)
    if not np.isfinite(extreme).all():
        raise UnsupportedModel("a weight is not a finite number", name, "check the checkpoint",
                               code="E-MODEL-QUANTIZE-VALUE")
    first = extreme / low  # the largest number gets the code that has no opposite
    if positive:
        first = np.maximum(most / high, least / low)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(first == 0, 0, 1 / first).astype(np.float32)
    weighted = values if importance is None else values * importance
    best, scale = np.zeros_like(first), first.copy()
    codes, product = np.empty_like(values), np.empty_like(values)
    for factor in FACTORS[bits]:
        _round(values, inverse / np.float32(factor), low, high, codes)
        along = np.multiply(weighted, codes, out=product).sum(axis=0)
        square = np.multiply(codes, codes, out=product)
        if importance is not None:
            square *= importance
        length = square.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where(length > 0, along * along / length, 0)
            better = gain > best
            scale = np.where(better, along / length, scale)
        best = np.where(better, gain, best)
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16).astype(np.float32)
    lost = (scale != 0) & (~np.isfinite(half) | (np.abs(half - scale) > np.abs(scale) / 64))
    if lost.any():
        worst = float(np.abs(scale[lost]).max())
        raise UnsupportedModel(f"a block needs a scale of {worst:.3g}, which float16 does not hold", name,
                               "leave this matrix as it is with a rule: --quantize FILE.toml",
                               code="E-MODEL-QUANTIZE-SCALE")
    with np.errstate(divide="ignore"):
        _round(values, np.where(half == 0, 0, 1 / half).astype(np.float32), low, high, codes)
    return half, codes.astype(np.int8)


def _round(values: Array, inverse: Array, low: int, high: int, out: Array) -> None:
    np.multiply(values, inverse, out=out)
    np.rint(out, out=out)
    np.clip(out, low, high, out=out)
