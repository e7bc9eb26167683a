"""PTX types as numpy types, and the number formats that numpy lacks. Registers hold unsigned words or booleans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
TYPES: dict[str, Any] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "f32": np.float32,
}
WORDS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SMALLEST_NORMAL = np.float32(2.0**-126)


def as_word(values: Array) -> Array:
    """The bits of the values as a register holds them: 8 bits lie in a 16-bit register."""
    if values.dtype == np.bool_:
        return values
    if values.dtype.itemsize == 1:
        return values.astype(np.uint16)
    return np.ascontiguousarray(values).view(WORDS[values.dtype.itemsize])


def widen(bits: Array, kind: str) -> Array:
    """bf16 or f16 words to fp32, exactly."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def narrow(values: Array, kind: str) -> Array:
    """fp32 to bf16 or f16 words, to nearest, ties to even; NaN stays NaN."""
    if kind == "f16":
        return values.astype(np.float32).astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _fp8_numbers() -> Array:
    """What each code of e4m3 stands for: sign, 4 bits of exponent with bias 7, 3 of mantissa, no infinity."""
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    sizes = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    sizes[127] = np.nan
    return np.concatenate([sizes, -sizes]).astype(np.float32)


FP8_NUMBERS = _fp8_numbers()
_FP8_MIDDLES = (FP8_NUMBERS[1:127].astype(np.float64) + FP8_NUMBERS[:126]) / 2


def from_fp8(codes: Array) -> Array:
    """e4m3 codes to fp32, exactly."""
    return FP8_NUMBERS[codes]


def to_fp8(values: Array) -> Array:
    """fp32 to e4m3 codes, to nearest, ties to even; beyond 448 the largest, NaN its own."""
    size = np.abs(values.astype(np.float64))
    below = np.searchsorted(_FP8_MIDDLES, size, side="left")  # the middle itself: the lower code
    above = np.searchsorted(_FP8_MIDDLES, size, side="right")
    codes = np.where(below % 2 == 0, below, above)
    return np.where(np.isnan(values), 127, codes | np.signbit(values) << 7).astype(np.uint8)


def flush(values: Array) -> Array:
    """Subnormal fp32 to zero of the same sign: the modifier .ftz."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values).astype(np.float32)


def made_up_error(values: Array, size: float) -> Array:
    """values with a relative error of at most `size`, the same for the same bits: as an approximate instruction has."""
    mixed = (values.view(np.uint32).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return (values.astype(np.float64) * (1 + size * (mixed.astype(np.float64) / 2**23 - 1))).astype(np.float32)


COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}
