"""What `model.onnx.data` consists of: tensors one after the other, and writing them in constant memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.writer import HashingFile
from ..graph_io import RECIPE
from .dtypes import cast, itemsize
from .slices import CHUNK_BYTES
from .source_kinds import PackedSource, Source, StoredSource

if TYPE_CHECKING:
    import onnx

ALIGNMENT = 64


@dataclass
class Stream:
    """One tensor of `model.onnx.data`: sources one after the other, in a type, for one or more initializers."""

    recipe: str
    sources: tuple[Source, ...]
    dtype: str
    tensors: list[onnx.TensorProto]
    offset: int = 0
    inside: list[tuple[onnx.TensorProto, int, int]] = field(default_factory=list)
    """further initializers that are a part of it: with the offset in it, and the bytes"""

    @property
    def nbytes(self) -> int:
        """Bytes it will have."""
        return sum(bytes_of(source, self.dtype) for source in self.sources)


def bytes_of(source: Source, dtype: str) -> int:
    """Bytes of a source in a type: two elements of four bits have one."""
    if isinstance(source, PackedSource) and source.dtype == dtype:
        return source.nbytes
    return math.prod(source.shape) * itemsize(dtype)


def write_streams(file: HashingFile, streams: Sequence[Stream], on_bytes: Callable[[int], None]) -> None:
    """Write streams to where they lie in a file, but for those that are in it already.

    Args:
        file: that they are written to.
        streams: in the order of their offsets.
        on_bytes: called with the bytes of streams so far; what it raises ends the writing.
    """
    there = file.tell()
    missing = [stream for stream in streams if stream.offset + stream.nbytes > there]
    done = sum(stream.nbytes for stream in streams) - sum(stream.nbytes for stream in missing)
    on_bytes(done)  # once: what is there is no work, and no part of the pace
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for stream in missing:
        file.write(bytes(stream.offset - file.tell()))
        for source in stream.sources:
            for chunk in source.chunks(buffer) if isinstance(source, StoredSource) else source.chunks():
                out = cast(chunk, source.dtype, stream.dtype, stream.recipe.removeprefix(RECIPE))
                file.write(out)
                done += out.nbytes
                on_bytes(done)
        file.mark()


def key_of(streams: Sequence[Stream]) -> str:
    """A hash over all that decides the bytes of these streams; "" if that is not only files and types."""
    rows, files = [], dict[Path, tuple[str, int, int]]()
    for stream in streams:
        for source in stream.sources:
            if not isinstance(source, StoredSource):
                return ""
            path = source.tensor.path
            if path not in files:
                stat = path.stat()
                files[path] = str(path.resolve()), stat.st_size, stat.st_mtime_ns
            rows.append([stream.offset, stream.dtype, *files[path], source.tensor.offset, source.tensor.nbytes,
                         source.dtype])
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
