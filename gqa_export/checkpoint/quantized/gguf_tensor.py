"""One quantized tensor of a GGUF file, as it is stored."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from ...errors import InvalidCheckpoint
from ...quantized.matrix import QuantizedMatrix, Stripe
from ..gguf_header import GgufHeader
from .ggml_blocks import BLOCK_TYPES, stripe_of

POWERS = ("MXFP4",)
"""types whose scales are powers of two"""
HALF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
"""types whose scales and minima are stored as float16; the others' are products of such a number and another"""


def stored_matrix(header: GgufHeader, name: str) -> QuantizedMatrix | None:
    """A tensor as it is stored; None if its type is not one of `BLOCK_TYPES`.

    Raises:
        InvalidCheckpoint: its rows do not consist of whole blocks.
    """
    kind, shape = header.tensors[name]
    if kind not in BLOCK_TYPES or len(shape) < 2 or not prod(shape):
        return None
    block = BLOCK_TYPES[kind]
    path, offset = header.places[name]
    if shape[-1] % block.elements:
        raise InvalidCheckpoint(f"rows of tensor {name!r} have {shape[-1]} values, which are not whole blocks of "
                                f"{block.elements}, as its type {block.name} has them", str(path),
                                "download or convert the file again", code="E-CKPT-QUANT-SHAPE")
    row_bytes = shape[-1] // block.elements * block.size

    def read(start: int, stop: int) -> Stripe:
        rows: Any = np.memmap(path, np.uint8, "r", offset, (prod(shape[:-1]), row_bytes)).view(np.ndarray)
        return stripe_of(block, rows[start:stop])

    return QuantizedMatrix(shape, block.bits, block.block, block.kind, block.offset, f"GGUF {block.name}", read,
                           scale_dtype="float16" if block.name in HALF else "float32", powers=block.name in POWERS,
                           tensors=(name,))
