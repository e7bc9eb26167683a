"""From the one form of quantized matrices to the bytes of a target's operator, stripe by stripe.

Parts of a packed matrix: `codes`; `scale`; `zero` points; `shift`, what each block adds to its columns beside the
symmetric codes; `minimum`, from which the graph computes the shift itself; the `global` scale of a whole matrix, beside
scales that are codes themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InvalidCheckpoint
from .facts import E4M3, FLOAT_CODES, Form
from .matrix import LEVELS, QuantizedMatrix, Stripe
from .packed_bits import packed, packed_in_a_row

PARTS = ("codes", "scale", "zero", "shift", "minimum", "global")
STRIPE_BYTES = 4 << 20
BITS = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "float16": 16, "bfloat16": 16, "float32": 32}
"""of an element of a type; of any other 8"""
SIGN = {"e4m3": np.uint8(128), "e2m1": np.uint8(8)}
"""kind -> the bit of a code that is its sign"""
SMALLEST = np.float32(2.0**-24)
"""in place of a scale of 0: a number of float16 and bfloat16"""
_DOUBLED = np.rint(2 * LEVELS["e2m1"]).astype(np.int16)


@dataclass(eq=False)
class Packer:
    """A matrix and the form that it takes. Scales and offsets are kept from the reading of the codes until they are
    written, so that a matrix is read once.

    Attributes:
        matrix: what is packed.
        form: how.
    """

    matrix: QuantizedMatrix
    form: Form
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def blocks(self) -> int:
        """Scales of a row in the form."""
        return -(-self.matrix.columns // self.form.block)

    def shape(self, part: str) -> tuple[int, ...]:
        """The shape of a part in elements of `dtype`."""
        rows, blocks, bits = self.matrix.rows, self.blocks, self.form.bits
        if self.form.kind != "int" and part != "codes":
            return () if part == "global" or self.form.per == "tensor" else (rows,) if self.form.per == "row" else \
                (rows, blocks)
        if self.form.columns_first:
            return (self.matrix.columns if part == "codes" else blocks, rows)
        if part == "codes":
            if self.form.operator == "MatMulBnb4":
                return (rows * self.matrix.columns // 2,)
            if self.form.operator == "DequantizeLinear":
                return (rows, self.matrix.columns)
            return (rows, blocks, self.form.block * bits // 8)
        if self.form.operator == "MatMulBnb4":
            return (rows * blocks,)
        if part == "zero" and self.form.operator != "DequantizeLinear":
            return (rows, -(-blocks * bits // 8))
        return (rows, blocks)

    def dtype(self, part: str) -> str:
        """The numpy (ml_dtypes) name of a part's elements."""
        if self.form.kind != "int":
            return {"codes": FLOAT_CODES[self.form.kind], "scale": self.form.scales}.get(part, "float32")
        if part in ("codes", "zero"):
            if self.form.operator == "DequantizeLinear":
                return f"{'' if self.form.signed else 'u'}int{self.form.bits}"
            return "uint8"
        return "float16" if self.form.half and part != "shift" else "float32"

    def nbytes(self, part: str) -> int:
        """Bytes of a part as `chunks` gives them."""
        bits = BITS.get(self.dtype(part), 8)
        return -(-math.prod(self.shape(part)) * bits // 8)

    def in_place(self, part: str) -> str:
        """The name of the stored tensor whose bytes are this very part, by their layout; "" where none is."""
        matrix, form = self.matrix, self.form
        bits = 4 if form.operator == "MatMulBnb4" else form.bits
        if form.columns_first or form.operator == "DequantizeLinear" or bits != matrix.bits or \
                matrix.columns % form.block:
            return ""
        if part == "codes":
            return matrix.in_place
        same = form.half and matrix.block == form.block and matrix.global_scale == 1.0
        return matrix.scales_in_place if part == "scale" and same else ""

    def chunks(self, part: str) -> Iterator[memoryview]:
        """The bytes of a part, some rows at a time."""
        if self.form.columns_first:
            yield _bytes(self._across(part))
            return
        if part == "global":
            yield _bytes(np.float32(self.matrix.global_scale))
            return
        if part == "scale" and self.form.per == "tensor":
            yield _bytes(self.pack(self.matrix.stripe(0, 1), part)[0])
            return
        if part in self._kept:
            yield _bytes(self._kept.pop(part))
            return
        if part == "zero" and self._one_zero_point:
            yield _bytes(self._packed_zeros(self._middles(self.matrix.rows)))
            return
        kept: dict[str, list[Any]] = {}
        for start, stop in self._stripes():
            found = self.matrix.stripe(start, stop)
            if part == "codes":
                for other in self.small_parts():
                    kept.setdefault(other, []).append(self.pack(found, other))
            yield _bytes(self.pack(found, part))
        self._kept.update({name: np.concatenate(values) for name, values in kept.items() if values})

    def _stripes(self) -> Iterator[tuple[int, int]]:
        """Rows that are read at once: their packed codes, and zero points, end with a whole byte."""
        return self.matrix.stripes(STRIPE_BYTES, 4, multiple=max(1, 8 // self.form.bits))

    def small_parts(self) -> tuple[str, ...]:
        """The parts beside the codes that are found while these are read."""
        if self.form.kind != "int":
            return () if self.form.per == "tensor" else ("scale",)
        shift = () if not self.form.shift else ("minimum",) if self.form.half and self.matrix.offset == "minimum" \
            else ("shift",)
        return ("scale", *(("zero",) if self.form.zeros else ()), *shift)

    def pack(self, found: Stripe, part: str) -> Any:
        """One part of a stripe, as an array of bytes or numbers, rows first."""
        if self.form.kind != "int":
            return packed(self._turned(found.codes, found), self.form.bits, pad=False) if part == "codes" else \
                self._number_scale(found)
        if part == "codes":
            return self._codes(found)
        if part == "zero":
            return self._packed_zeros(self._zero_points(found))
        scale = found.scale
        if self.matrix.global_scale != 1.0:
            scale = (scale.astype(np.float64) * self.matrix.global_scale).astype(np.float32)
        if self.matrix.kind == "e2m1":
            scale = scale / 2
        if part == "scale":
            return self._stored(self._per_block(self._above_zero(scale)), part)
        if part == "minimum":
            assert found.minimum is not None
            return self._stored(self._per_block(found.minimum), part)
        middle = np.float64(1 << (self.matrix.bits - 1))
        exact = found.scale.astype(np.float64)
        if found.minimum is not None:
            shift = found.minimum + middle * exact
        else:
            assert found.zero is not None
            shift = (middle - found.zero) * exact
        return self._stored(self._per_block((shift * self.matrix.global_scale).astype(np.float32)), part)

    def _number_scale(self, found: Stripe) -> Any:
        """The scales of codes that are numbers, `[rows, blocks]`, in the form's type."""
        scale = found.scale
        if self.form.scales != E4M3 and self.matrix.global_scale != 1.0:
            scale = (scale.astype(np.float64) * self.matrix.global_scale).astype(np.float32)
        return self._stored(self._per_block(self._above_zero(scale)), "scale")

    def _stored(self, values: Any, part: str) -> Any:
        dtype = self.dtype(part)
        if dtype == "float32":
            return np.ascontiguousarray(values, np.float32)
        import ml_dtypes

        held = values.astype(np.float16 if dtype == "float16" else getattr(ml_dtypes, dtype))
        if not np.array_equal(held.astype(np.float32), values):
            raise InvalidCheckpoint(f"{part} of {self.matrix.label} has a value that {dtype} does not hold",
                                    ", ".join(self.matrix.tensors[:1]), "report this checkpoint",
                                    code="E-WEIGHTS-SCALE")
        return held

    def _per_block(self, values: Any) -> Any:
        """Scales of the matrix's blocks as those of the form's, which are parts of them."""
        if self.matrix.block == self.form.block:
            return values
        place = np.minimum(np.arange(self.blocks) * self.form.block // self.matrix.block, values.shape[1] - 1)
        return values[:, place]

    def _codes(self, found: Stripe) -> Any:
        form = self.form
        if form.operator == "MatMulBnb4":
            pairs = found.codes.reshape(-1, 2)
            return (pairs[:, 0] << 4) | pairs[:, 1]
        codes = self._numbers(found)
        if form.operator == "DequantizeLinear":
            return packed(codes, form.bits, pad=False)
        missing = self.blocks * form.block - codes.shape[1]
        if missing:
            codes = np.pad(codes, ((0, 0), (0, missing)), constant_values=1 << (form.bits - 1))
        return packed(codes, form.bits)

    def _numbers(self, found: Stripe) -> Any:
        """The codes as the form numbers them: from 0 or, where they are signed, around 0; as bytes."""
        middle, codes = 1 << (self.form.bits - 1), found.codes
        own = 1 << (self.matrix.bits - 1)  # a shift of the form's middle would cancel digits where it is far from these
        if self.matrix.kind == "e2m1":
            codes = _DOUBLED[codes]
        around_zero = self.matrix.offset == "none"
        if around_zero and not self.form.signed:
            codes = codes.astype(np.int16) + middle
        elif not around_zero and (self.form.signed or self.form.shift):
            codes = codes.astype(np.int16) - own + (0 if self.form.signed else middle)
        return self._turned(codes, found).astype(np.uint8)

    def _above_zero(self, scale: Any) -> Any:
        """Scales as the form takes them."""
        return np.where(scale == 0, SMALLEST, np.abs(scale)).astype(np.float32) if self.form.positive else scale

    def _turned(self, codes: Any, found: Stripe) -> Any:
        """Codes `[rows, K]` with the other sign where their scale is below 0, and 0 where it is 0."""
        if not self.form.positive or (found.scale > 0).all():
            return codes
        below, none = (np.repeat(each, self.matrix.block, axis=1)[:, : codes.shape[1]]
                       for each in (found.scale < 0, found.scale == 0))
        if self.form.kind != "int":
            return np.where(none, 0, np.where(below, codes ^ SIGN[self.form.kind], codes)).astype(np.uint8)
        codes = codes.astype(np.int16)
        if (below & (codes == -128)).any():
            raise InvalidCheckpoint(f"{self.matrix.label} has the code -128 under a scale below 0, and the target "
                                    "takes neither that scale nor 128", ", ".join(self.matrix.tensors[:1]),
                                    "use --quantize dequantize", code="E-WEIGHTS-SIGN")
        return np.where(none, 0, np.where(below, -codes, codes))

    @property
    def _one_zero_point(self) -> bool:
        """All zero points are the middle of the codes: none needs the matrix to be read."""
        return self.form.shift or self.matrix.offset != "zero"

    def _zero_points(self, found: Stripe) -> Any:
        if found.zero is None or self._one_zero_point:
            return self._middles(found.codes.shape[0])
        return self._per_block(found.zero).astype(np.uint8)

    def _middles(self, rows: int) -> Any:
        return np.full((rows, self.blocks), 1 << (self.form.bits - 1), np.uint8)

    def _packed_zeros(self, zeros: Any) -> Any:
        if self.form.operator == "DequantizeLinear":
            return packed(zeros, self.form.bits, pad=False).reshape(-1)
        return packed(zeros, self.form.bits)

    def _across(self, part: str) -> Any:
        """A part with columns first: the whole matrix is read, its codes one byte each, and packed then."""
        if part in self._kept:
            return self._kept.pop(part)
        whole: dict[str, Any] = {}
        for start, stop in self.matrix.stripes(STRIPE_BYTES, 4):
            found = self.matrix.stripe(start, stop)
            for each in (part, *(self.small_parts() if part == "codes" else ())):
                numbers = self._numbers(found) if each == "codes" else self._zero_points(found) if each == "zero" else \
                    self.pack(found, each)
                if each not in whole:
                    whole[each] = np.empty((numbers.shape[1], self.matrix.rows), numbers.dtype)
                whole[each][:, start:stop] = numbers.T
        for each in ("codes", "zero"):
            if each in whole:
                whole[each] = packed_in_a_row(whole.pop(each), self.form.bits)
        result = whole.pop(part)
        self._kept.update(whole)
        return result


def _bytes(values: Any) -> memoryview:
    flat: Any = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return memoryview(flat)
