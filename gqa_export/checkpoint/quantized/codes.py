"""Weights whose codes have a row for each of theirs: the layouts that several formats share."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from ...quantized.matrix import QuantizedMatrix, Stripe
from ...quantized.packed_bits import unpack_bits
from ..safetensors_header import StoredTensor
from .scales import Scales
from .stored import E4M3, Rows, stored_array

Array = Any
"""a numpy array"""


def byte_rows(tensor: StoredTensor) -> Rows:
    """(start, stop) -> these rows as bytes, uint8 `[rows, bytes]`."""
    rows = prod(tensor.shape[:-1])

    def read(start: int, stop: int) -> Array:
        whole = stored_array(tensor).reshape(rows, -1) if rows else np.zeros((0, 0), np.uint8)
        return np.ascontiguousarray(whole[start:stop]).view(np.uint8)

    return read


def whole_bytes(tensor: StoredTensor, scales: Scales, label: str, names: tuple[str, ...],
                **more: Any) -> QuantizedMatrix:
    """A weight of float8 e4m3 or of signed bytes, `[..., N, K]`, one byte an element."""
    read, kind = byte_rows(tensor), "e4m3" if tensor.dtype == E4M3 else "int"

    def stripe(start: int, stop: int) -> Stripe:
        codes = read(start, stop)
        return Stripe(codes.view(np.int8) if kind == "int" else codes, scales.read(start, stop))

    return QuantizedMatrix(tensor.shape, 8, scales.block, kind, "none", label, stripe, row_block=scales.row_block,
                           scale_dtype=scales.dtype, powers=scales.powers, tensors=names, **more)


def nibbles(tensor: StoredTensor, shape: tuple[int, ...], kind: str, scales: Scales, label: str,
            names: tuple[str, ...], *, high_first: bool = False, **more: Any) -> QuantizedMatrix:
    """A weight of four-bit numbers (e2m1, nf4, fp4), two a byte along K."""
    read = byte_rows(tensor)

    def stripe(start: int, stop: int) -> Stripe:
        stored = read(start, stop)
        return Stripe(unpack_bits(stored >> 4 | stored << 4 if high_first else stored, 4, shape[-1]),
                      scales.read(start, stop))

    return QuantizedMatrix(shape, 4, scales.block, kind, "none", label, stripe, row_block=scales.row_block,
                           scale_dtype=scales.dtype, powers=scales.powers, tensors=names, **more)


def integers(read: Rows, zeros: Rows | None, scales: Scales, shape: tuple[int, ...], bits: int, label: str,
             names: tuple[str, ...], **more: Any) -> QuantizedMatrix:
    """A weight of unsigned codes. read: the codes. zeros: int16 zero points `[rows, blocks]`; None: 2 ** (bits - 1)."""

    def stripe(start: int, stop: int) -> Stripe:
        codes, scale = read(start, stop), scales.read(start, stop)
        if zeros is None:
            return Stripe((codes.astype(np.int16) - (1 << bits - 1)).astype(np.int8), scale)
        return Stripe(codes, scale, zeros(start, stop))

    return QuantizedMatrix(shape, bits, scales.block, "int", "none" if zeros is None else "zero", label, stripe,
                           row_block=scales.row_block, scale_dtype=scales.dtype, tensors=names, **more)


def sorted_by_group(matrix: QuantizedMatrix, order: Array) -> QuantizedMatrix:
    """The matrix with its codes in the order of columns that brings those of one group together. Its reader gives
    codes in the order that is stored."""

    def read(start: int, stop: int) -> Stripe:
        found = matrix.stripe(start, stop)
        return replace(found, codes=found.codes[:, order])

    return replace(matrix, read=read, column_order=order.astype(np.int32), in_place="",
                   scales_in_place="")
