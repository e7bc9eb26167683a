"""What a graph must know of a quantized matrix to hold it, and how it holds it: no weight is read here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .matrix import QuantizedMatrix

BLOCKS = (128, 64, 32, 16, 256)
"""columns that may share a scale in MatMulNBits, the ones to prefer first. 256 is last: at 2 bits it is slow."""
WIDER = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}
FLOAT32 = 1
"""ONNX's number of float32"""
SEPARATOR = "@"
"""between a weight's name and its form and part, in a recipe"""
BNB4 = {"fp4": 0, "nf4": 1}
"""kind -> quant_type of MatMulBnb4"""
FLOAT_CODES = {"e4m3": "float8_e4m3fn", "e2m1": "float4_e2m1fn"}
"""kind -> the number format of its codes, by the name that ml_dtypes has for it"""
E4M3 = FLOAT_CODES["e4m3"]
LEAST_BLOCK = 8
"""columns: below, the scales are as large as the codes"""


@dataclass(frozen=True, eq=False)
class MatrixFacts:
    """A quantized matrix without its data. Fields as of `QuantizedMatrix`, and:

    Attributes:
        zeros_fit: zero points lie within the codes. It means nothing for other offsets.
        lossless: the values are those of the checkpoint, before a graph's number format rounds any.
        scales: the smallest type that holds every scale of a block, the second scale of the whole matrix beside it.
    """

    shape: tuple[int, ...]
    bits: int
    block: int
    kind: str
    offset: str
    label: str
    half: bool = False
    zeros_fit: bool = True
    lossless: bool = True
    transposed: bool = False
    scales: str = "float32"
    row_block: int = 1
    column_order: Any = field(default=None, repr=False)
    column_scale: Any = field(default=None, repr=False)

    @property
    def columns(self) -> int:
        """K."""
        return self.shape[-1]

    def alike(self, other: MatrixFacts | None) -> bool:
        """Whether the rows of both may be one matrix."""
        return other is not None and self._compared() == other._compared() and all(
            (a is None) == (b is None) and (a is None or np.array_equal(a, b))
            for a, b in ((self.column_order, other.column_order), (self.column_scale, other.column_scale)))

    def _compared(self) -> tuple[Any, ...]:
        return (self.shape[1:], self.bits, self.block, self.kind, self.offset, self.half, self.zeros_fit,
                self.transposed)


def facts_of(matrix: QuantizedMatrix, *, lossless: bool = True) -> MatrixFacts:
    """The facts of a matrix. Of one with zero points these are read, to learn whether they fit."""
    half = matrix.scale_dtype in ("float16", E4M3) and matrix.global_scale == 1.0 and matrix.kind in ("int", "e2m1")
    return MatrixFacts(matrix.shape, matrix.bits, matrix.block, matrix.kind, matrix.offset, matrix.label, half,
                       _zeros_fit(matrix), lossless, matrix.transposed, _scales_of(matrix), matrix.row_block,
                       matrix.column_order, matrix.column_scale)


def _scales_of(matrix: QuantizedMatrix) -> str:
    """e4m3 scales of e2m1 codes keep the matrix's second scale apart; others are multiplied by it."""
    if matrix.kind == "e2m1" and matrix.scale_dtype == E4M3 and matrix.block < matrix.columns:
        return E4M3
    if matrix.global_scale != 1.0:
        return "float32"
    return "float16" if matrix.scale_dtype == E4M3 else matrix.scale_dtype


def _zeros_fit(matrix: QuantizedMatrix) -> bool:
    if matrix.offset != "zero":
        return True
    most = (1 << WIDER[matrix.bits]) - 1
    for start, stop in matrix.stripes():
        zero = matrix.stripe(start, stop).zero
        assert zero is not None
        if zero.size and (int(zero.min()) < 0 or int(zero.max()) > most):
            return False
    return True


@dataclass(frozen=True)
class Form:
    """How a target's operator holds a matrix.

    Attributes:
        operator: "MatMulNBits", "MatMulBnb4" or "DequantizeLinear".
        bits: of a code: 2, 4 or 8.
        block: columns that share a scale.
        zeros: zero points are stored.
        shift: beside the symmetric codes, what each block adds to its columns is stored, and multiplies block sums.
        half: scales (and minima) are stored as float16.
        signed: codes are signed integers, not offset by 2^(bits - 1).
        columns_first: stored `[K, N]`.
        kind: of the codes, as of `QuantizedMatrix`.
        scales: where the codes are floating-point numbers, the type in which scales are stored: "float32", "float16",
            "bfloat16"; or "float8_e4m3fn", with a second scale of the whole matrix beside them.
        per: what has one scale: a "block" of columns, a "row", or the whole "tensor".
        positive: no scale is 0 or below: codes have the other sign instead.
    """

    operator: str
    bits: int
    block: int
    zeros: bool = False
    shift: bool = False
    half: bool = False
    signed: bool = False
    columns_first: bool = False
    kind: str = "int"
    scales: str = ""
    per: str = "block"
    positive: bool = False

    @property
    def key(self) -> str:
        """Tells forms of one matrix apart in recipes."""
        flags = zip("zshicp", (self.zeros, self.shift, self.half, self.signed, self.columns_first, self.positive))
        form = f"{self.operator.lower()}{self.bits}x{self.block}" + "".join(flag for flag, on in flags if on)
        return form if self.kind == "int" else f"{form}.{self.kind}.{self.per}.{self.scales}"


def nbits_form(facts: MatrixFacts) -> Form | str:
    """How MatMulNBits or MatMulBnb4 holds a matrix, or why they do not.

    Source: onnxruntime docs/ContribOperators.md and runs of 1.31: bits 2, 4, 8; blocks 16 to 256; zero points packed
    along a row's blocks.
    """
    if facts.kind in BNB4:
        if facts.block in (16, 32, 64, 128) and facts.columns % facts.block == 0 and facts.column_order is None:
            return Form("MatMulBnb4", 4, facts.block)
        return f"MatMulBnb4 does not take blocks of {facts.block} of {facts.columns} columns"
    if facts.kind not in ("int", "e2m1"):
        return f"no operator takes {facts.kind} codes on a CPU"
    block = _block(facts)
    if not block:
        return f"no operator takes blocks of {facts.block} columns"
    bits = 8 if facts.kind == "e2m1" else WIDER[facts.bits]
    zeros = facts.offset == "zero" and facts.zeros_fit
    return Form("MatMulNBits", bits, block, zeros, facts.offset != "none" and not zeros, facts.half)


def bnb4_misfit(form: Form, element: int) -> str:
    """Why a form does not go with the graph's floating-point numbers (their ONNX type); "" if it does."""
    return "MatMulBnb4 takes float32 alone" if form.operator == "MatMulBnb4" and element != FLOAT32 else ""


def dequantize_form(facts: MatrixFacts, *, zeros: bool, blocks: tuple[int, ...] = (), columns_first: bool = True,
                    positive: bool = False) -> Form | str:
    """How DequantizeLinear holds a matrix, or why it does not.

    Args:
        facts: of the matrix.
        zeros: the target takes zero points that are not 0.
        blocks: the block sizes that the target takes; () for all.
        columns_first: the target has it `[K, N]`, blocks along axis 0.
        positive: the target takes codes of eight bits with scales above 0 alone.
    """
    if facts.kind not in ("int", "e2m1"):
        return f"it has {facts.kind} codes"
    block = _block(facts)
    if not block or (blocks and block not in blocks) or facts.columns % block:
        return f"no operator takes blocks of {facts.block} of {facts.columns} columns"
    bits = 8 if facts.kind == "e2m1" else max(4, WIDER[facts.bits])
    held = zeros and facts.offset == "zero" and facts.zeros_fit
    shift, positive = facts.offset != "none" and not held, positive and bits == 8
    # a graph that computes shifts needs the scales as they are
    return Form("DequantizeLinear", bits, block, held, shift, facts.half and not (positive and shift), not held,
                columns_first, positive=positive)


def float_form(facts: MatrixFacts) -> Form | str:
    """How DequantizeLinear holds codes that are floating-point numbers, as such, or why it does not.

    TensorRT-RTX 1.7 builds blocks of any number of columns that divides a row. It takes 200 columns with two scales for
    blocks of 100, whatever `block_size` says, so a last block that is not full is cut into smaller ones.
    """
    rows, columns = math.prod(facts.shape[:-1]), facts.columns
    if facts.block >= columns and len(facts.shape) == 2:
        per, block = ("tensor" if facts.row_block >= rows else "row"), columns
    else:
        per, block = "block", math.gcd(facts.block, columns)
        if block < LEAST_BLOCK:
            return f"no operator takes blocks of {facts.block} of {columns} columns"
    if facts.kind == "e2m1" and columns % 2:
        return f"two codes share a byte, and a row has {columns}"
    return Form("DequantizeLinear", facts.bits, block, kind=facts.kind, scales=facts.scales, per=per,
                positive=facts.scales != E4M3)


def gather_form(facts: MatrixFacts, form: Form) -> Form | str:
    """How GatherBlockQuantized holds what `form` holds for a product, or why it does not. Zero points are always
    stored: the default differs between providers (microsoft/onnxruntime)."""
    if form.operator != "MatMulNBits" or facts.kind != "int":
        return f"GatherBlockQuantized does not take {facts.kind} codes"
    if facts.column_order is not None or facts.column_scale is not None:
        return "its columns have an order or scales of their own"
    if facts.columns % form.block:
        return f"{facts.columns} columns are not whole blocks of {form.block}"
    return replace(form, operator="GatherBlockQuantized", zeros=True)


def _block(facts: MatrixFacts) -> int:
    """The block of the operator: the matrix's own, a divisor of it, or where a row has one scale, one that divides the
    row; 0 where there is none."""
    if facts.block >= facts.columns:
        return next((block for block in BLOCKS[:4] if facts.columns % block == 0), 32)
    return next((block for block in (256, 128, 64, 32, 16) if facts.block % block == 0), 0)
