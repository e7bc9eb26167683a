"""Kinds of places where a weight's bytes are: in a checkpoint's file as they are (`StoredSource`), codes in such a file
(`DequantizedSource`), made by a function, one tensor at a time (`MemorySource`: merged, computed), a part of a packed
matrix (`PackedSource`), or ranges of an axis of another (`SliceSource`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..checkpoint.safetensors_header import StoredTensor
from .dtypes import itemsize
from .slices import CHUNK_BYTES, Part, Pieces, made_pieces, read_into, stored_pieces

if TYPE_CHECKING:
    from ..quantized.matrix import QuantizedMatrix
    from ..quantized.packing import Packer


@dataclass(frozen=True)
class StoredSource:
    """A tensor whose bytes lie in a checkpoint's file."""

    tensor: StoredTensor

    @property
    def dtype(self) -> str:
        """numpy (ml_dtypes) name of the stored type."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""
        return self.tensor.shape

    def chunks(self, buffer: memoryview | None = None) -> Iterator[memoryview]:
        """The bytes, at most CHUNK_BYTES at a time; each chunk is overwritten by the next. buffer: of CHUNK_BYTES, that
        they are read into; None makes one."""
        if buffer is None:
            buffer = memoryview(bytearray(min(CHUNK_BYTES, max(self.tensor.nbytes, 1))))
        with open(self.tensor.path, "rb", buffering=0) as file:
            file.seek(self.tensor.offset)
            left = self.tensor.nbytes
            while left:
                count = min(left, len(buffer))
                read_into(file, buffer[:count], self.tensor.path)
                left -= count
                yield buffer[:count]


@dataclass(frozen=True, eq=False)
class MemorySource:
    """A tensor made on demand.

    Attributes:
        make: gives a torch tensor or numpy array of this dtype and shape, or an iterator of its parts along the first
            dimension, one at a time.
        dtype: numpy (ml_dtypes) name.
        shape: of the tensor.
    """

    make: Callable[[], Any]
    dtype: str
    shape: tuple[int, ...]

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, at most CHUNK_BYTES at a time."""
        made = self.make()
        for value in made if isinstance(made, Iterator) else (made,):
            yield from _bytes_of(value)


def _bytes_of(value: Any) -> Iterator[memoryview]:
    import numpy as np

    if hasattr(value, "detach"):
        import torch

        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    flat: Any = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    for start in range(0, flat.nbytes, CHUNK_BYTES):
        yield memoryview(flat[start : start + CHUNK_BYTES])


@dataclass(frozen=True, eq=False)
class DequantizedSource:
    """The values of a quantized weight, in float32, made stripe by stripe.

    Attributes:
        matrix: the weight.
    """

    matrix: QuantizedMatrix
    dtype = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the model's parameter."""
        return self.matrix.parameter_shape

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, some rows at a time; of transposed ones, an expert at a time."""
        import numpy as np

        for values in self.parts():
            yield memoryview(values.reshape(-1).view(np.uint8))

    def parts(self) -> Iterator[Any]:
        """The values float32, arrays one behind the other."""
        import numpy as np

        rows = self.matrix.shape[-2]
        parts = self.matrix.stripes(CHUNK_BYTES, 4) if not self.matrix.transposed else (
            (start, start + rows) for start in range(0, self.matrix.rows, rows))
        for start, stop in parts:
            values: Any = self.matrix.dequantize(start, stop)
            yield np.ascontiguousarray(values.T if self.matrix.transposed else values, np.float32)


@dataclass(frozen=True, eq=False)
class PackedSource:
    """One part of a packed matrix. Its bytes may have several shapes with the same rows: operators differ there."""

    packer: Packer
    part: str

    @property
    def dtype(self) -> str:
        """numpy (ml_dtypes) name."""
        return self.packer.dtype(self.part)

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements of `dtype`."""
        return self.packer.shape(self.part)

    @property
    def nbytes(self) -> int:
        """Two elements of four bits have one byte."""
        return self.packer.nbytes(self.part)

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, some rows at a time."""
        yield from self.packer.chunks(self.part)


@dataclass(frozen=True)
class SliceSource:
    """Some ranges of one axis of a tensor, in order: read piece by piece where the tensor is stored.

    Attributes:
        whole: the tensor.
        axis: of it.
        ranges: [start, stop) of entries.
    """

    whole: StoredSource | MemorySource
    axis: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def dtype(self) -> str:
        """As of the whole."""
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        shape = self.whole.shape
        return (*shape[:self.axis], sum(stop - start for start, stop in self.ranges), *shape[self.axis + 1:])

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, about CHUNK_BYTES at a time; each chunk is overwritten by the next."""
        shape = self.whole.shape
        entry = math.prod(shape[self.axis + 1:]) * itemsize(self.dtype)
        pieces = Pieces(math.prod(shape[:self.axis]), shape[self.axis] * entry,
                        tuple((start * entry, (stop - start) * entry) for start, stop in self.ranges))
        if isinstance(self.whole, StoredSource):
            return stored_pieces(self.whole.tensor.path, self.whole.tensor.offset, pieces)
        return made_pieces(self.whole.make(), pieces)


Source = StoredSource | MemorySource | DequantizedSource | PackedSource | SliceSource


def source_of_part(part: Part, source: Source) -> Source:
    """Where the bytes of a part are. Rows of a stored tensor are a stored tensor again, so that a graph can point at
    them. source: where those of the whole are."""
    (start, stop), *more = part.ranges
    if isinstance(source, DequantizedSource):
        source = MemorySource(source.parts, source.dtype, source.shape)
    if not isinstance(source, StoredSource | MemorySource):
        raise TypeError(f"a part of a part of {part.whole}")
    if isinstance(source, StoredSource) and not part.axis and not more:
        row = math.prod(source.shape[1:]) * itemsize(source.dtype)
        return StoredSource(replace(source.tensor, offset=source.tensor.offset + start * row,
                                    nbytes=(stop - start) * row, shape=(stop - start, *source.shape[1:])))
    return SliceSource(source, part.axis, part.ranges)
