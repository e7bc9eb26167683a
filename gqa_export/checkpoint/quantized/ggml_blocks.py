"""The blocks of ggml's quantized types -> codes, scales and minima, without rounding.

Source: the structs and `dequantize_row_*` of https://github.com/ggml-org/llama.cpp, `ggml/src/ggml-common.h` and
`ggml-quants.c`. A product of a half-precision scale and a scale of at most eight bits is exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ...quantized.matrix import Stripe

Array = Any
"""a numpy array"""
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
"""the numbers of the codes of IQ4_NL and IQ4_XS"""


class BlockType(NamedTuple):
    """One quantized type of ggml.

    Attributes:
        name: ggml's.
        elements: of a stored block, which takes `size` bytes.
        size: see `elements`.
        bits: of a code as it is given, see `QuantizedMatrix`.
        block: elements that share a scale.
        kind: see `QuantizedMatrix`.
        offset: see `QuantizedMatrix`.
        read: uint8 `[blocks, size]` -> codes `[blocks, elements]`, scale `[blocks, elements / block]`, minimum.
    """

    name: str
    elements: int
    size: int
    bits: int
    block: int
    kind: str
    offset: str
    read: Callable[[Array], tuple[Array, Array, Array | None]]


def stripe_of(kind: BlockType, rows: Array) -> Stripe:
    """The stripe of stored rows, uint8 `[rows, bytes]`."""
    if not len(rows):
        return stripe_of(kind, np.zeros((1, rows.shape[1]), np.uint8)).rows(slice(0, 0))
    codes, scale, minimum = kind.read(np.ascontiguousarray(rows).reshape(-1, kind.size))
    count = len(rows)
    return Stripe(codes.reshape(count, -1), scale.reshape(count, -1),
                  minimum=None if minimum is None else minimum.reshape(count, -1))


def _half(raw: Array, at: int) -> Array:
    """The float16 at byte `at` of every block, as float32 `[blocks, 1]`."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view(np.float16).astype(np.float32)


def _spread(raw: Array, group: int, shifts: range, mask: int) -> Array:
    """Each `group` bytes once for every shift, one after the other, masked: uint8 `[blocks, bytes * len(shifts)]`."""
    by = np.array(shifts, np.uint8)[None, None, :, None]
    return ((raw.reshape(len(raw), -1, 1, group) >> by) & np.uint8(mask)).reshape(len(raw), -1)


def _nibbles(raw: Array, group: int = 16) -> Array:
    """The low nibbles of every `group` bytes, then their high nibbles."""
    return _spread(raw, group, range(0, 8, 4), 15)


def _signed(codes: Array, zero: int) -> Array:
    return (codes - np.uint8(zero)).view(np.int8)


def _q4_0(raw: Array) -> tuple[Array, Array, Array | None]:
    return _signed(_nibbles(raw[:, 2:]), 8), _half(raw, 0), None


def _q4_1(raw: Array) -> tuple[Array, Array, Array | None]:
    return _nibbles(raw[:, 4:]), _half(raw, 0), _half(raw, 2)


def _fifth(raw: Array) -> Array:
    """The fifth bits of 32 codes, in place."""
    return np.unpackbits(raw, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(raw: Array) -> tuple[Array, Array, Array | None]:
    return _signed(_nibbles(raw[:, 6:]) | _fifth(raw[:, 2:6]), 16), _half(raw, 0), None


def _q5_1(raw: Array) -> tuple[Array, Array, Array | None]:
    return _nibbles(raw[:, 8:]) | _fifth(raw[:, 4:8]), _half(raw, 0), _half(raw, 2)


def _q8_0(raw: Array) -> tuple[Array, Array, Array | None]:
    return raw[:, 2:].copy().view(np.int8), _half(raw, 0), None


def _q2_k(raw: Array) -> tuple[Array, Array, Array | None]:
    scales, codes = raw[:, :16], _spread(raw[:, 16:80], 32, range(0, 8, 2), 3)
    return codes, _half(raw, 80) * (scales & 15), -_half(raw, 82) * (scales >> 4)


def _q3_k(raw: Array) -> tuple[Array, Array, Array | None]:
    high = _spread(raw[:, :32], 32, range(8), 1)
    codes = _signed(_spread(raw[:, 32:96], 32, range(0, 8, 2), 3) | high << np.uint8(2), 4)
    scales = _spread(raw[:, 96:104], 8, range(0, 8, 4), 15) | _spread(raw[:, 104:108], 4, range(0, 8, 2), 3) << 4
    return codes, _half(raw, 108) * _signed(scales, 32), None


def _six_bits(raw: Array) -> tuple[Array, Array]:
    """The eight scales and eight minima of six bits in twelve bytes."""
    first, second, rest = raw[:, :4], raw[:, 4:8], raw[:, 8:12]
    scales = np.concatenate([first & 63, rest & 15 | first >> 2 & 48], axis=1)
    return scales, np.concatenate([second & 63, rest >> 4 | second >> 2 & 48], axis=1)


def _q4_k(raw: Array) -> tuple[Array, Array, Array | None]:
    scales, minima = _six_bits(raw[:, 4:16])
    return _nibbles(raw[:, 16:], 32), _half(raw, 0) * scales, -_half(raw, 2) * minima


def _q5_k(raw: Array) -> tuple[Array, Array, Array | None]:
    scales, minima = _six_bits(raw[:, 4:16])
    codes = _nibbles(raw[:, 48:], 32) | _spread(raw[:, 16:48], 32, range(8), 1) << np.uint8(4)
    return codes, _half(raw, 0) * scales, -_half(raw, 2) * minima


def _q6_k(raw: Array) -> tuple[Array, Array, Array | None]:
    codes = _nibbles(raw[:, :128], 64) | _spread(raw[:, 128:192], 32, range(0, 8, 2), 3) << np.uint8(4)
    scales = np.ascontiguousarray(raw[:, 192:208]).view(np.int8)
    return _signed(codes, 32), _half(raw, 208) * scales, None


def _iq4_nl(raw: Array) -> tuple[Array, Array, Array | None]:
    return IQ4[_nibbles(raw[:, 2:])], _half(raw, 0), None


def _iq4_xs(raw: Array) -> tuple[Array, Array, Array | None]:
    low = _spread(raw[:, 4:8], 1, range(0, 8, 4), 15)
    high = _spread(raw[:, 2:4], 1, range(0, 8, 2), 3)
    return IQ4[_nibbles(raw[:, 8:])], _half(raw, 0) * _signed(low | high << np.uint8(4), 32), None


def _mxfp4(raw: Array) -> tuple[Array, Array, Array | None]:
    return _nibbles(raw[:, 1:]), np.ldexp(np.float32(1), raw[:, :1].astype(np.int32) - 127), None


BLOCK_TYPES: dict[int, BlockType] = {
    2: BlockType("Q4_0", 32, 18, 4, 32, "int", "none", _q4_0),
    3: BlockType("Q4_1", 32, 20, 4, 32, "int", "minimum", _q4_1),
    6: BlockType("Q5_0", 32, 22, 5, 32, "int", "none", _q5_0),
    7: BlockType("Q5_1", 32, 24, 5, 32, "int", "minimum", _q5_1),
    8: BlockType("Q8_0", 32, 34, 8, 32, "int", "none", _q8_0),
    10: BlockType("Q2_K", 256, 84, 2, 16, "int", "minimum", _q2_k),
    11: BlockType("Q3_K", 256, 110, 3, 16, "int", "none", _q3_k),
    12: BlockType("Q4_K", 256, 144, 4, 32, "int", "minimum", _q4_k),
    13: BlockType("Q5_K", 256, 176, 5, 32, "int", "minimum", _q5_k),
    14: BlockType("Q6_K", 256, 210, 6, 16, "int", "none", _q6_k),
    20: BlockType("IQ4_NL", 32, 18, 8, 32, "int", "none", _iq4_nl),
    23: BlockType("IQ4_XS", 256, 136, 8, 32, "int", "none", _iq4_xs),
    39: BlockType("MXFP4", 32, 17, 4, 32, "e2m1", "none", _mxfp4),
}
"""ggml's number of a type -> its blocks. Types that are not here (IQ1 to IQ3, ternary ones) are not kept quantized."""
