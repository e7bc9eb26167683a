"""A quantized matrix in the one form that readers and quantizers produce, and targets pack. They share nothing else.

`value[n, k] = global_scale * column_scale[k] * (scale * number)` or with an offset `scale * (code - zero)` or
`scale * code + minimum`, where `scale`, `zero` and `minimum` are those of row n and of the block that k is in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from ..errors import InvalidCheckpoint

BITS = (2, 3, 4, 5, 6, 8)
OFFSETS = ("none", "zero", "minimum")
STRIPE_BYTES = 8 << 20
Array = Any
"""a numpy array"""


def _e4m3() -> Array:
    """The numbers of float8 e4m3fn: sign, four bits of exponent (bias 7), three of mantissa; 0x7f is not a number."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values = np.where(codes & 127 == 127, np.nan, values)
    return np.where(codes & 128, -values, values)


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
LEVELS: dict[str, Array] = {
    "e2m1": np.array([*_E2M1, *(-value for value in _E2M1)]),
    "e4m3": _e4m3(),
    "nf4": np.array(_NF4),
    "fp4": np.array([*_FP4, *(-value for value in _FP4)]),
}
"""kind -> the number of every code, float64. Kind "int" is not here: its codes are their numbers. The tables of nf4 and
fp4 are bitsandbytes' (`functional.get_4bit_type`, as float32)."""
KINDS = ("int", *LEVELS)
TENSORS_OF = {"scale": re.compile(r"(?<!input_)(?<!quant_)(scale\w*|absmax|SCB)$"), "minimum": re.compile(r"\.zero$"),
              "column scale": re.compile(r"pre_quant_scale$")}
"""part of a weight -> what the names of the stored tensors end in that it is read from, where there are several"""


@dataclass(frozen=True, eq=False)
class Stripe:
    """Some rows of a quantized matrix, unpacked.

    Attributes:
        codes: `[rows, K]`, one code an element: int8 for kind "int" without an offset, else uint8.
        scale: float32 `[rows, blocks]`.
        zero: `[rows, blocks]` of an integer type, where the matrix has the offset "zero". May lie outside of the codes.
        minimum: float32 `[rows, blocks]`, where it has the offset "minimum".
    """

    codes: Array
    scale: Array
    zero: Array | None = None
    minimum: Array | None = None

    def rows(self, which: Array | slice) -> Stripe:
        """Rows of this stripe, in the order of `which`."""
        return Stripe(self.codes[which], self.scale[which], None if self.zero is None else self.zero[which],
                      None if self.minimum is None else self.minimum[which])


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A quantized weight. Its data are read stripe by stripe.

    Attributes:
        shape: `[N, K]`, or `[E, N, K]` of stacked experts. Rows are counted through the leading axes.
        bits: of a code as it is held here, one of `BITS`.
        block: columns that share a scale, in the order of the codes; K for one scale a row. The last may have fewer.
        kind: how a code becomes a number: "int", or a key of `LEVELS`.
        offset: "none": scale * number, and codes of kind "int" are signed. "zero": scale * (code - zero). "minimum":
            scale * code + minimum. Codes with an offset are unsigned. What is symmetric has "none", however stored.
        label: the stored format for people, "GPTQ 4 bits, group 128".
        read: (start, stop) -> the stripe of these rows; no more memory than the stripe takes.
        column_order: int32 `[K]`: column j of the codes is column `column_order[j]` of the weight; `[E, K]` of experts
            that have one each. None: in order.
        global_scale: a second scale of the whole matrix, which is not in `Stripe.scale`. 1.0 where there is none.
        column_scale: float32 `[K]`, in the weight's own order: the layer multiplies its input by it before this
            matrix (AWQ's smoothing that was not folded into a norm). None: it does not.
        row_block: rows that share a scale (128 of FP8 blocks, N of one scale for all). `Stripe.scale` repeats it.
        input_scale: the static scale of the layer's input where the checkpoint was made for quantized activations.
            The weight does not depend on it. None: it has none. no_input_scale: why, where it was made for them; ""
            otherwise.
        transposed: the model's parameter has the last two axes the other way round (GPT-OSS' experts, GPT-2's
            matrices).
        scale_dtype: the smallest type of which every scale and every minimum is a number: "float8_e4m3fn", "float16",
            "bfloat16", else "float32".
        powers: every scale of a block is a power of two.
        tensors: names of the stored tensors that it is made of.
        in_place: the name of a stored tensor whose bytes are the codes packed along K: of kind "int" low bits first,
            each offset by 2^(bits - 1); of nf4 and fp4 the first of two in the high half. "" where none is.
        scales_in_place: the name of a stored tensor of float16 that is the scales `[N, blocks]`; "" where none is.
    """

    shape: tuple[int, ...]
    bits: int
    block: int
    kind: str
    offset: str
    label: str
    read: Callable[[int, int], Stripe] = field(repr=False)
    column_order: Array | None = field(default=None, repr=False)
    global_scale: float = 1.0
    column_scale: Array | None = field(default=None, repr=False)
    row_block: int = 1
    input_scale: float | None = None
    transposed: bool = False
    scale_dtype: str = "float32"
    powers: bool = False
    tensors: tuple[str, ...] = field(default=(), repr=False)
    in_place: str = ""
    scales_in_place: str = ""
    no_input_scale: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for a form that does not exist: the mistake of a reader, not of a checkpoint."""
        if self.bits not in BITS or self.kind not in KINDS or self.offset not in OFFSETS or len(self.shape) < 2:
            raise ValueError(f"{self.bits} bits of kind {self.kind!r} with offset {self.offset!r}, shape {self.shape}")
        if self.offset != "none" and self.kind != "int":
            raise ValueError(f"codes of kind {self.kind!r} do not have an offset")
        if not 1 <= self.block <= max(self.columns, 1):
            raise ValueError(f"blocks of {self.block} columns in a matrix of {self.columns}")
        order = self.column_order
        if order is not None and (order.shape not in ((self.columns,), (self.shape[0], self.columns)) or not (
                np.sort(order) == np.arange(self.columns)).all()):
            raise ValueError("column_order is not a permutation of the columns")

    @property
    def rows(self) -> int:
        """All rows, through the leading axes."""
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """K: columns of the weight."""
        return self.shape[-1]

    @property
    def blocks(self) -> int:
        """Scales of a row."""
        return -(-self.columns // self.block)

    @cached_property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of the model's parameter."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    def stripe(self, start: int = 0, stop: int | None = None) -> Stripe:
        """The rows [start, stop), with their shapes checked, and that their numbers are some: whatever is made of a
        weight comes by here.

        Raises:
            ValueError: the reader gave something else.
            InvalidCheckpoint: a scale, a minimum or a code is NaN or infinite.
        """
        stop = self.rows if stop is None else stop
        found = self.read(start, stop)
        scales = (stop - start, self.blocks)
        kind = np.int8 if self.kind == "int" and self.offset == "none" else np.uint8
        there = [("codes", found.codes, (stop - start, self.columns)), ("scale", found.scale, scales)]
        there += [("zero", found.zero, scales)] * (self.offset == "zero")
        there += [("minimum", found.minimum, scales)] * (self.offset == "minimum")
        for name, values, shape in there:
            if values is None or values.shape != shape:
                raise ValueError(f"{self.label}: {name} is {None if values is None else values.shape}, not {shape}")
        if found.codes.dtype != kind or found.scale.dtype != np.float32:
            raise ValueError(f"{self.label}: codes are {found.codes.dtype}, scales {found.scale.dtype}")
        self.refuse_not_finite("scale", found.scale, start)
        if found.minimum is not None:
            self.refuse_not_finite("minimum", found.minimum, start)
        if self.column_scale is not None:
            self.refuse_not_finite("column scale", self.column_scale[None], 0)
        if self.kind == "e4m3" and (found.codes & 127 == 127).any():  # of 4 bits, every code is a number
            self.refuse_not_finite("code", LEVELS["e4m3"][found.codes], start)
        return found

    def refuse_not_finite(self, part: str, values: Array, start: int = 0) -> None:
        """Refuse numbers of this weight that are NaN or infinite. Zeros and those below zero are legal.

        Args:
            part: what they are, for the message: "scale", "minimum", "column scale" or "code".
            values: float `[rows, blocks]`, or `[rows, K]`.
            start: the number of their first row.

        Raises:
            InvalidCheckpoint: with the first of them.
        """
        wrong = ~np.isfinite(values)
        if not wrong.any():
            return
        row, place = (int(each) for each in np.argwhere(wrong)[0])
        width = self.block if values.shape[1] == self.blocks else 1
        last = min((place + 1) * width, self.columns) - 1
        columns = f"column {last}" if width == 1 else f"columns {place * width} to {last}"
        place_text = columns if part == "column scale" else f"row {start + row}, {columns}"
        names = [name for name in self.tensors if part in TENSORS_OF and TENSORS_OF[part].search(name)] or \
            list(self.tensors[:1])
        raise InvalidCheckpoint(
            f"the {part} of {place_text} of a quantized weight ({self.label}) is {values[row, place]}, expected "
            f"a finite number; {int(wrong.sum())} of these {wrong.size} are not",
            f"module {self.tensors[0].rpartition('.')[0]}, tensor {' or '.join(names)}" if names else "",
            "download the checkpoint again, or quantize the original again: no prediction of this one is a number",
            code="E-CKPT-QUANT-NAN")

    def stripes(self, nbytes: int = STRIPE_BYTES, itemsize: int = 8, *, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """(start, stop) of stripes that take about `nbytes` with so many bytes an element, in order. multiple: of which
        their rows are one, but for the last."""
        step = max(1, nbytes // max(1, self.columns * itemsize))
        step += -step % multiple
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)

    def dequantize(self, start: int = 0, stop: int | None = None) -> Array:
        """The weight's rows [start, stop) as float64 `[rows, K]`, in the weight's own order of columns."""
        found = self.stripe(start, stop)

        values = found.codes.astype(np.float64) if self.kind == "int" else LEVELS[self.kind][found.codes]
        whole = self.columns == self.blocks * self.block
        blocks = values.reshape(len(values), self.blocks, self.block) if whole else values

        def spread(each: Array) -> Array:
            each = each.astype(np.float64)
            return each[..., None] if whole else np.repeat(each, self.block, axis=1)[:, : self.columns]

        if found.zero is not None and self.offset == "zero":
            blocks -= spread(found.zero)
        blocks *= spread(found.scale)
        if found.minimum is not None and self.offset == "minimum":
            blocks += spread(found.minimum)
        if self.global_scale != 1.0:
            values *= self.global_scale
        if self.column_order is not None:
            ordered, order = np.empty_like(values), self.column_order
            if order.ndim == 2:  # of each row's expert
                order = order[np.arange(start, start + len(values)) * len(order) // self.rows]
            np.put_along_axis(ordered, np.broadcast_to(order, values.shape), values, axis=1)
            values = ordered
        if self.column_scale is not None:
            values *= self.column_scale.astype(np.float64)
        return values

    def parameter(self) -> Array:
        """The whole weight as the model has it, float64."""
        whole = self.dequantize().reshape(self.shape)
        return np.ascontiguousarray(whole.swapaxes(-1, -2)) if self.transposed else whole
