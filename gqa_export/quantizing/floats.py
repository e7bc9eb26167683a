"""Rounding to float8 (e4m3) and float4 (e2m1, as NVFP4), with the scale of each block searched for: the smallest
squared error, weighted by how large the layer's inputs are where they are known.

FP8: blocks of any size with scales of float16. NVFP4: blocks of 16 whose scales are numbers of e4m3 under one of the
whole matrix. That one is the power of two at or above amax / (6 * 448): every number format holds it exactly, and e4m3
has exponents to spare. Source of the format: NVIDIA's TensorRT Model Optimizer, `NVFP4QTensor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import UnsupportedModel
from ..quantized.facts import E4M3
from ..quantized.matrix import LEVELS, STRIPE_BYTES, QuantizedMatrix, Stripe
from .rtn import PIECE, by_block

Array = Any
"""a numpy array"""
MOST = {"e4m3": 448.0, "e2m1": 6.0}
"""kind -> its largest number"""
TYPES = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e2m1": np.dtype(ml_dtypes.float4_e2m1fn)}
FACTORS = {"e4m3": tuple(2.0 ** (step / 4) for step in range(4)),
           "e2m1": (1.0, 0.78, 0.85, 0.92, 1.1, 1.2, 1.35, 1.5)}
"""kind -> the scale's part of what puts the block's largest number on the kind's: what is tried. e4m3 is the same in
every octave, and loses nothing by a larger scale"""
NVFP4_BLOCK = 16
LARGEST_HALF = 65504.0
LEAST_HALF = 2.0**-14
"""numbers of float16, and the smallest with all its digits"""


def quantize_floats(rows: Callable[[int, int], Array], shape: tuple[int, int], kind: str, block: int, label: str,
                    importance: Array | None = None) -> QuantizedMatrix:
    """A matrix to be quantized while it is read. The largest number of one of e2m1 is read at once.

    Args:
        rows: (start, stop) -> these rows as floating-point numbers `[rows, K]`.
        shape: `[N, K]`.
        kind: "e4m3" or "e2m1".
        block: columns that share a scale, at most: blocks divide a row. Of e2m1 they are 16.
        label: what the values are quantized from, for people.
        importance: `[K]`, how much an error of each column counts; None: all the same.

    Raises:
        UnsupportedModel: a value is not finite.
    """
    block = math.gcd(NVFP4_BLOCK if kind == "e2m1" else block, shape[1])
    whole = 1.0 if kind == "e4m3" else _second_scale(_largest(rows, shape, label))

    def read(start: int, stop: int) -> Stripe:
        return quantize_rows(rows(start, stop), kind, block, whole, label, importance)

    return QuantizedMatrix(shape, 8 if kind == "e4m3" else 4, block, kind, "none", label, read, global_scale=whole,
                           scale_dtype="float16" if kind == "e4m3" else E4M3)


def _largest(rows: Callable[[int, int], Array], shape: tuple[int, int], label: str) -> float:
    step, most = max(1, STRIPE_BYTES // (4 * max(shape[1], 1))), 0.0
    for start in range(0, shape[0], step):
        most = max(most, _most(rows(start, min(start + step, shape[0])), label))
    return most


def _most(values: Array, label: str) -> float:
    most = float(np.abs(values, dtype=np.float32).max(initial=0))
    if not math.isfinite(most):
        raise UnsupportedModel("a weight is not a finite number", label, "check the checkpoint",
                               code="E-MODEL-QUANTIZE-VALUE")
    return most


def _second_scale(most: float) -> float:
    """The scale of a whole matrix whose largest number is `most`."""
    if most == 0:
        return 1.0
    return float(2.0 ** max(math.ceil(math.log2(most / (MOST["e2m1"] * MOST["e4m3"]))), -126))


def quantize_rows(values: Array, kind: str, block: int, whole: float, label: str,
                  importance: Array | None = None) -> Stripe:
    """Quantize rows `[rows, K]`. whole: the scale of the whole matrix. Other arguments as of `quantize_floats`.

    Raises:
        UnsupportedModel: a value is not finite, or a block's scale does not fit float16.
    """
    count, columns = values.shape
    blocks = -(-columns // block)
    codes, scales = np.empty((count, columns), np.uint8), np.empty((count, blocks), np.float32)
    step = max(1, PIECE // max(columns, 1))
    weight = None if importance is None else by_block(importance[None].astype(np.float32), block, blocks)
    for start in range(0, count, step):
        piece = values[start : start + step].astype(np.float32, copy=False)
        _most(piece, label)
        across = by_block(piece, block, blocks)
        repeated = None if weight is None else np.tile(weight, (1, len(piece)))
        scale, found = _search(across, kind, whole, repeated, label)
        scales[start : start + step] = scale.reshape(len(piece), blocks)
        codes[start : start + step] = found.T.reshape(len(piece), blocks * block)[:, :columns]
    return Stripe(codes, scales)


def _search(values: Array, kind: str, whole: float, importance: Array | None, label: str) -> tuple[Array, Array]:
    """Scales `[blocks]`, beside that of the whole matrix, and codes `[block, blocks]` of `values` `[block, blocks]`."""
    first = np.abs(values).max(axis=0) / np.float32(MOST[kind] * whole)
    best = scale = None
    for factor in FACTORS[kind]:
        tried = _held(first * np.float32(factor), kind, label)
        lost = values - LEVELS[kind].astype(np.float32)[_codes(values, tried, kind, whole)] * (tried * whole)
        np.square(lost, out=lost)
        if importance is not None:
            lost *= importance
        error = lost.sum(axis=0)
        if best is None or scale is None:
            best, scale = error, tried
        else:
            better = error < best
            best, scale = np.where(better, error, best), np.where(better, tried, scale)
    assert scale is not None
    return scale, _codes(values, scale, kind, whole)


def _held(scale: Array, kind: str, label: str) -> Array:
    """Scales as the format holds them."""
    if kind == "e2m1":
        return np.minimum(scale, MOST["e4m3"]).astype(TYPES["e4m3"]).astype(np.float32)
    most = float(scale.max(initial=0))
    if most > LARGEST_HALF:
        raise UnsupportedModel(f"a block needs a scale of {most:.3g}, which float16 does not hold", label,
                               "leave this matrix as it is with a rule: --quantize FILE.toml",
                               code="E-MODEL-QUANTIZE-SCALE")
    # a float's codes lose nothing by a scale that is larger than it must be
    return np.where(scale == 0, 0, np.maximum(scale, LEAST_HALF)).astype(np.float16).astype(np.float32)


def _codes(values: Array, scale: Array, kind: str, whole: float) -> Array:
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, 0, 1 / (scale.astype(np.float64) * whole)).astype(np.float32)
    near = np.clip(values * inverse, -MOST[kind], MOST[kind])
    found: Array = near.astype(TYPES[kind]).view(np.uint8)
    return found
