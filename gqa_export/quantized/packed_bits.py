"""Codes of a few bits in bytes, the first code in the lowest bits, and the other way round."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any
"""a numpy array"""
STRIPE_CODES = 4 << 20
"""packed at once: a multiple of the codes of a byte"""


def unpack_bits(stored: Array, bits: int, count: int) -> Array:
    """The codes of rows of bytes.

    Args:
        stored: uint8 `[rows, bytes]`.
        bits: of a code, 1 to 8; codes may lie across bytes.
        count: codes of a row; what follows them is padding.

    Returns:
        uint8 `[rows, count]`.
    """
    if bits == 8:
        return stored[:, :count].copy()
    if bits in (1, 2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return ((stored[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(
            len(stored), stored.shape[1] * len(shifts))[:, :count]
    single = np.unpackbits(stored, axis=1, bitorder="little", count=count * bits).reshape(len(stored), count, bits)
    return np.packbits(single, axis=2, bitorder="little")[:, :, 0]


def pack_bits(codes: Array, bits: int) -> Array:
    """Rows of bytes of codes, uint8 `[rows, ceil(count * bits / 8)]`; the last byte is filled with zeros.

    Args:
        codes: uint8 `[rows, count]`, below 2 ** bits.
        bits: of a code, 1 to 8.
    """
    single = np.unpackbits(codes[:, :, None], axis=2, bitorder="little", count=bits)
    return np.packbits(single.reshape(len(codes), -1), axis=1, bitorder="little")


def packed(codes: Any, bits: int, *, pad: bool = True) -> Any:
    """Codes of a row, low bits first; each row padded to a byte, or all rows one after the other without `pad`."""
    if bits == 8:
        return codes
    if not pad:
        codes = codes.reshape(1, -1)
    count = 8 // bits
    missing = -codes.shape[1] % count
    if missing:
        codes = np.pad(codes, ((0, 0), (0, missing)))
    codes = codes & ((1 << bits) - 1)
    out = codes[:, 0::count].copy()
    for place in range(1, count):
        out |= codes[:, place::count] << (bits * place)
    return out


def packed_in_a_row(codes: Any, bits: int) -> Any:
    """As `packed` without `pad`, some bytes at a time: no more memory than the codes and the result take."""
    if bits == 8:
        return codes
    flat = codes.reshape(-1)
    out = np.empty(-(-flat.size * bits // 8), np.uint8)
    for start in range(0, flat.size, STRIPE_CODES):
        some = packed(flat[start : start + STRIPE_CODES], bits, pad=False).reshape(-1)
        first = start * bits // 8
        out[first : first + some.size] = some
    return out
