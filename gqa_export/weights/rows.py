"""Rows of a weight as floating-point numbers, read where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .dtypes import itemsize, numpy_dtype
from .source_kinds import DequantizedSource, MemorySource, Source, StoredSource

Rows = Callable[[int, int], Any]
"""(start, stop) -> float32 `[stop - start, K]`"""


def rows_of(source: Source, stack: tuple[int, ...] = (), *, transposed: bool = False) -> Rows:
    """The rows of a source of two axes. One in memory is made once, at the first row, and kept until the last.

    Args:
        source: the weight.
        stack: `[E, N, K]` of experts whose rows are wanted, one expert below the other; of one in memory, as much is
            kept as is made at once: an expert, or all.
        transposed: the weight has each expert as `[K, N]`.
    """
    if stack:
        return _stacked_rows(source, stack, transposed=transposed)
    if isinstance(source, StoredSource):
        return _stored_rows(source)
    if isinstance(source, DequantizedSource) and source.matrix.transposed:
        whole = source.matrix
        source = MemorySource(lambda: whole.parameter().astype(np.float32), "float32", source.shape)
    if isinstance(source, DequantizedSource):
        return lambda start, stop: source.matrix.dequantize(start, stop).astype(np.float32)
    made: list[Any] = []

    def read(start: int, stop: int) -> Any:
        if not made:
            assert isinstance(source, MemorySource)
            made.append(_array(source.make()))
        rows = np.array(made[0][start:stop], np.float32)
        if stop >= source.shape[0]:
            made.clear()
        return rows

    return read


def _array(value: Any) -> Any:
    return value.detach().float().numpy() if hasattr(value, "detach") else value


def _stored_rows(source: StoredSource) -> Rows:
    _, columns = source.shape
    return lambda start, stop: _stored(source, start * columns, stop * columns).reshape(stop - start, columns)


def _stored(source: StoredSource, start: int, stop: int) -> Any:
    """The elements [start, stop) of a stored tensor, float32 `[stop - start]`."""
    tensor = source.tensor
    size = itemsize(tensor.dtype)
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset + start * size)
        data = np.fromfile(file, np.uint8, (stop - start) * size)
    if tensor.dtype == "bfloat16":  # its bits are the upper half of a float32's
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(numpy_dtype(tensor.dtype)).astype(np.float32, copy=False)


def _stacked_rows(source: Source, stack: tuple[int, ...], *, transposed: bool) -> Rows:
    """Rows of experts, read or made an expert at a time."""
    experts, rows, columns = stack
    one = rows * columns
    if isinstance(source, StoredSource) and not transposed:
        return lambda start, stop: _stored(source, start * columns, stop * columns).reshape(stop - start, columns)
    if isinstance(source, DequantizedSource) and source.matrix.transposed == transposed:
        return lambda start, stop: source.matrix.dequantize(start, stop).astype(np.float32)
    kept = _Experts(source, experts, one)

    def read(start: int, stop: int) -> Any:
        pieces = []
        for number in range(start // rows, -(-stop // rows)):
            whole = kept(number)
            whole = whole.reshape(columns, rows).T if transposed else whole.reshape(rows, columns)
            pieces.append(whole[max(start - number * rows, 0):stop - number * rows])
        return np.concatenate(pieces) if pieces else np.zeros((0, columns), np.float32)

    return read


class _Experts:
    """Experts of a weight one at a time, `[N * K]`: the last one that was asked for is kept, and what follows it in
    the same part that was made."""

    def __init__(self, source: Source, experts: int, size: int) -> None:
        self.source, self.experts, self.size = source, experts, size
        self._number, self._value = -1, np.zeros(0, np.float32)
        self._next, self._rest = 0, np.zeros(0, np.float32)
        self._parts: Iterator[Any] = iter(())

    def __call__(self, number: int) -> Any:
        if number == self._number:
            return self._value
        if isinstance(self.source, StoredSource):
            self._value = _stored(self.source, number * self.size, (number + 1) * self.size)
        else:
            self._value = self._made(number)
        self._number = number
        return self._value

    def _made(self, number: int) -> Any:
        if not self._next or number < self._next:
            self._parts, self._next, self._rest = self._begin(), 0, np.zeros(0, np.float32)
        while True:
            while len(self._rest) < self.size:
                part = np.asarray(_array(next(self._parts)), np.float32).reshape(-1)
                self._rest = np.concatenate([self._rest, part]) if len(self._rest) else part
            value, self._rest = self._rest[:self.size], self._rest[self.size:]
            self._next += 1
            if self._next > number:
                if self._next == self.experts:  # the last: what is kept goes
                    self._next, self._rest = 0, np.zeros(0, np.float32)
                return value

    def _begin(self) -> Iterator[Any]:
        if isinstance(self.source, DequantizedSource):
            return self.source.parts()
        assert isinstance(self.source, MemorySource)
        made = self.source.make()
        return made if isinstance(made, Iterator) else iter(made.reshape(self.experts, -1))
