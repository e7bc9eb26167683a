"""Rows of a weight as floating-point numbers, read where they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .dtypes import numpy_dtype
from .source_kinds import DequantizedSource, MemorySource, Source, StoredSource

Rows = Callable[[int, int], Any]
"""(start, stop) -> float32 `[stop - start, K]`"""


def rows_of(source: Source) -> Rows:
    """The rows of a source of two axes. One in memory is made once, at the first row, and kept until the last."""
    if isinstance(source, StoredSource):
        return _stored_rows(source)
    if isinstance(source, DequantizedSource):
        return lambda start, stop: source.matrix.dequantize(start, stop).astype(np.float32)
    made: list[Any] = []

    def read(start: int, stop: int) -> Any:
        if not made:
            assert isinstance(source, MemorySource)
            value = source.make()
            made.append(value.detach().float().numpy() if hasattr(value, "detach") else value)
        rows = np.array(made[0][start:stop], np.float32)
        if stop >= source.shape[0]:
            made.clear()
        return rows

    return read


def _stored_rows(source: StoredSource) -> Rows:
    tensor, (_, columns) = source.tensor, source.shape
    row_bytes = tensor.nbytes // max(source.shape[0], 1)

    def read(start: int, stop: int) -> Any:
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset + start * row_bytes)
            data = np.fromfile(file, np.uint8, (stop - start) * row_bytes)
        if tensor.dtype == "bfloat16":  # its bits are the upper half of a float32's
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(stop - start, columns)
        return data.view(numpy_dtype(tensor.dtype)).astype(np.float32, copy=False).reshape(stop - start, columns)

    return read
