"""The rule by which a quantized cache holds keys and values: codes of 8 bits as they are, of 4 bits two to a byte.

`code = clip(rint(x / scale), -128, 127)` (4 bits: -8, 7), ties to even; `value = scale * code`. Of 4 bits, element 2i
lies in the low half of byte i, each as code + 8. Codes of fp8 are the 8-bit floats (e4m3) nearest to x / scale, ties to
even, of at most 448. New tokens are attended as they are stored.

Source: runs of ONNX Runtime 1.31's GroupQueryAttention on a CPU: outputs agree to 5e-7, codes are equal.
"""

from __future__ import annotations

import numpy as np

FP8_MOST = 448.0
"""the largest 8-bit float of 4 bits of exponent and 3 of mantissa"""
TIE = 1e-3
"""a number this near to the middle between two codes may become either: what rounding in fp32 can do to it"""
MOST_TIE = 0.45
"""and never nearer to one of the two codes than this: every code next to a number would be right then"""
CANDIDATES = np.linspace(0.3, 1.0, 29)
"""scales that are tried, in parts of the one that clips nothing"""
SAMPLE = 1 << 18
"""numbers of one tensor from which its scale is chosen"""


def limits(bits: int) -> tuple[int, int]:
    """The least and the largest code."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def encode(values: np.ndarray, scale: float, bits: int) -> np.ndarray:
    """Codes of numbers, int8, one for each element."""
    return np.clip(np.rint(values / np.asarray(scale, values.dtype)), *limits(bits)).astype(np.int8)


def encode_fp8(values: np.ndarray, scale: float) -> np.ndarray:
    """Codes of numbers as 8-bit floats, one for each element; a NaN stays one."""
    import ml_dtypes

    return np.clip(values / np.asarray(scale, values.dtype), -FP8_MOST, FP8_MOST).astype(ml_dtypes.float8_e4m3fn)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [.., D] as a cache holds them: int8 [.., D], or uint8 [.., D / 2]."""
    if bits == 8:
        return codes
    high = (codes + 8).astype(np.uint8)
    return high[..., 0::2] | high[..., 1::2] << 4


def unpack(stored: np.ndarray, bits: int) -> np.ndarray:
    """`pack` undone: int8 [.., D]."""
    if bits == 8:
        return stored
    codes = np.stack([stored & 15, stored >> 4], -1).astype(np.int8) - 8
    return codes.reshape(*stored.shape[:-1], 2 * stored.shape[-1])


def decode(stored: np.ndarray, scale: float, bits: int) -> np.ndarray:
    """The numbers that a cache stands for, fp32 [.., D]."""
    return unpack(stored, bits).astype(np.float32) * np.float32(scale)


def choose_scale(values: np.ndarray, bits: int, fp8: bool = False) -> tuple[float, float]:
    """The scale that loses least of these numbers (mean squared error), and the share of them that it clips. fp8: codes
    are 8-bit floats."""
    flat = np.asarray(values, np.float32).reshape(-1)
    sample = flat[:: max(1, len(flat) // SAMPLE)]
    high = FP8_MOST if fp8 else limits(bits)[1]
    whole = float(np.abs(flat).max(initial=0.0)) / high or 1.0
    scales = [float(np.float32(whole * part)) for part in CANDIDATES]
    errors = []
    for scale in scales:
        codes = encode_fp8(sample, scale).astype(np.float32) if fp8 else encode(sample, scale, bits)
        errors.append(float(((codes * np.float32(scale) - sample) ** 2).mean()))
    best = scales[int(np.argmin(errors))]
    if fp8:
        return best, float((np.abs(flat / np.float32(best)) > FP8_MOST).mean())
    low, high = limits(bits)
    rounded = np.rint(flat / np.float32(best))
    return best, float(((rounded < low) | (rounded > high)).mean())
