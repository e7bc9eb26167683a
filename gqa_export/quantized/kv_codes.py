"""The rule by which a quantized cache holds keys and values: codes of 8 bits as they are, of 4 bits two to a byte.

`code = clip(rint(x / scale), -128, 127)` (4 bits: -8, 7), ties to even; `value = scale * code`. Of 4 bits, element 2i
lies in the low half of byte i, each as code + 8. New tokens are attended as they are stored.

Source: runs of ONNX Runtime 1.31's GroupQueryAttention on a CPU: outputs agree to 5e-7, codes are equal.
"""

from __future__ import annotations

import numpy as np

TIE = 1e-3
"""a number this near to the middle between two codes may become either: what rounding in fp32 can do to it"""
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


def choose_scale(values: np.ndarray, bits: int) -> tuple[float, float]:
    """The scale that loses least of these numbers (mean squared error), and the share of them that it clips."""
    flat = np.asarray(values, np.float32).reshape(-1)
    sample = flat[:: max(1, len(flat) // SAMPLE)]
    high = limits(bits)[1]
    whole = float(np.abs(flat).max(initial=0.0)) / high or 1.0
    scales = [float(np.float32(whole * part)) for part in CANDIDATES]
    errors = [float(((encode(sample, scale, bits) * np.float32(scale) - sample) ** 2).mean()) for scale in scales]
    best = scales[int(np.argmin(errors))]
    low, high = limits(bits)
    rounded = np.rint(flat / np.float32(best))
    return best, float(((rounded < low) | (rounded > high)).mean())
