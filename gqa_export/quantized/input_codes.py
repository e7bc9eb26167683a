"""Inputs of products that have the type of their weight: FP8 (W8A8) and NVFP4 (W4A4), and the scale by which each is
rounded.

FP8: one scale for all; `code = e4m3(x / scale)`, the nearest number of at most 448, ties to even. NVFP4: one scale for
all beside one for each block of 16 columns, which is found as the graph runs: `block = e4m3(amax / 6 / scale)`, `code =
e2m1(x / (block * scale))`; a block whose scale is 0 becomes zeros. The scale is a number of fp32 for FP8, and of the
graph's format for NVFP4: TensorRT for RTX 1.7 takes it no other way.

Source: NVIDIA's TensorRT documentation, "Quantization Schemes" and "DynamicQuantize", and its TensorRT Model Optimizer
(`modelopt/torch/kernels/quantization/common/nvfp4_quant.py`: ties of e2m1 to even; `amax / 448` and `amax / (6 * 448)`
in `modelopt/torch/export/quant_utils.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .facts import E4M3, MatrixFacts

MOST = {"e4m3": 448.0, "e2m1": 6.0 * 448.0}
"""kind -> what a scale of 1 reaches: of e2m1 the largest code times the largest scale of a block"""
BLOCK = 16
"""columns of a block of NVFP4"""
CLOSE = 1e-6
"""two scales that differ by less are one: what JSON and fp32 can do to it"""

NO_SCALE = "there is no static scale for its inputs"


@dataclass(frozen=True)
class InputCodes:
    """How a product rounds its input. kind: of the codes, "e4m3" or "e2m1". scale: above 0, as the graph holds it."""

    kind: str
    scale: float


def scale_of(largest: float, kind: str) -> float:
    """The scale by which inputs are rounded whose largest absolute value is `largest`."""
    return largest / MOST[kind]


def input_codes(facts: MatrixFacts, scale: float | None, dtype: str, why: str = NO_SCALE) -> InputCodes | str:
    """How the product with a matrix rounds its input, or why it does not.

    Args:
        facts: of the matrix.
        scale: of its input; None: it has none.
        dtype: number format of the graph, "float16".
        why: it has none.
    """
    if facts.kind not in MOST:
        return f"inputs are not rounded for codes of {'integers' if facts.kind == 'int' else facts.kind}"
    if len(facts.shape) > 2:
        return "stacked experts are dequantized as a whole, and their products are not of FP8 or FP4"
    if facts.kind == "e4m3" and facts.block < facts.columns:
        return ("TensorRT has products of FP8 whose weight has one scale, or one a row, and this has one for "
                f"{facts.block} columns")
    if facts.kind == "e2m1" and (facts.scales != E4M3 or facts.block != BLOCK):
        return f"inputs are rounded for NVFP4's blocks of {BLOCK} alone, and this has MXFP4's or others"
    if facts.kind == "e2m1" and facts.columns % BLOCK:
        return f"blocks of {BLOCK} do not divide {facts.columns} columns"
    if scale is None:
        return why
    held = held_as(scale, facts.kind, dtype)
    if not 0 < held < math.inf:
        return f"{dtype} does not hold the scale {scale:.3g} of its inputs"
    return InputCodes(facts.kind, held)


def held_as(scale: float, kind: str, dtype: str) -> float:
    """A scale as a graph of a number format holds it."""
    if kind == "e4m3":
        return float(np.float32(scale))
    if dtype == "bfloat16":
        import ml_dtypes

        return float(np.float32(scale).astype(ml_dtypes.bfloat16))
    with np.errstate(over="ignore"):
        return float(np.float32(scale).astype(np.dtype(dtype)))
