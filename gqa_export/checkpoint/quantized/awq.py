"""AWQ as AutoAWQ writes it (version gemm): codes and zero points packed along N, eight a word in an order of its own.

Source: https://github.com/casper-hansen/AutoAWQ, `awq/modules/linear/gemm.py` and `awq/utils/packing_utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...quantized.matrix import QuantizedMatrix
from ..refusals import refuse_quantized
from ..safetensors_header import StoredTensor
from .codes import integers
from .description import Description
from .scales import Scales, held_in
from .stored import SCALES, Stored, floats, stored_array

Array = Any
"""a numpy array"""
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""the column, of eight, of each nibble of a word from the lowest up"""
PLACES = np.argsort(ORDER)


def read_awq(description: Description, stored: Stored) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Every quantized weight by its name.

    Raises:
        InvalidCheckpoint: a weight lacks a tensor, or one does not fit.
        UnsupportedModel: the layout is another one.
    """
    modules = stored.modules(".qweight")
    if not modules:
        return
    version = description.text("version", "packing_format", "checkpoint_format", "format")
    bits, zero = description.number("bits", "w_bit", default=4), description.fields.get("zero_point", True)
    if version.split(":")[-1] not in ("", "gemm", "awq", "auto_awq") or bits != 4 or zero is not True or \
            description.text("backend") == "llm-awq":
        refuse_quantized(f"AWQ, layout {version or description.text('backend')}, {bits} bits, "
                         f"{'with' if zero is True else 'without'} zero points", stored.where)
    group = description.number("group_size", "q_group_size", default=128) or -1
    for module in modules:
        yield f"{module}.weight", _matrix(stored, module, group)


def _matrix(stored: Stored, module: str, told: int) -> QuantizedMatrix:
    codes = stored.take(f"{module}.qweight", ("int32",))
    if len(codes.shape) != 2:
        raise stored.shape(f"{module}.qweight", "expected two axes")
    columns, rows = codes.shape[0], codes.shape[1] * 8
    group = columns if told < 0 else min(told, columns)
    blocks = -(-columns // group)
    scale = stored.take(f"{module}.scales", SCALES, (blocks, rows))
    zeros = stored.take(f"{module}.qzeros", ("int32",), (blocks, rows // 8))
    scales = Scales(lambda start, stop: np.ascontiguousarray(floats(scale, np.s_[:, start:stop]).T), group,
                    dtype=held_in(scale))
    names = tuple(f"{module}.{part}" for part in ("qweight", "scales", "qzeros"))
    return integers(lambda start, stop: unpacked(codes, start, stop),
                    lambda start, stop: unpacked(zeros, start, stop).astype(np.int16), scales, (rows, columns), 4,
                    f"AWQ 4 bits, group {group}, asymmetric", names)


def unpacked(tensor: StoredTensor, start: int, stop: int) -> Array:
    """The nibbles of some columns of N, uint8 `[stop - start, axis 0 of the tensor]`."""
    words = np.ascontiguousarray(stored_array(tensor)[:, start // 8 : -(-stop // 8)]).view(np.uint32)
    nibbles = words[:, :, None] >> (np.arange(8, dtype=np.uint32) * np.uint32(4)) & np.uint32(15)
    found = nibbles[:, :, PLACES].astype(np.uint8).reshape(len(words), words.shape[1] * 8)
    return np.ascontiguousarray(found[:, start % 8 : start % 8 + stop - start].T)
