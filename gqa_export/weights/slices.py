"""Parts of weights by name, `A[0:8]` (rows) or `A[:,0:8;16:24]` (ranges of the second axis), and their bytes, read
piece by piece in constant memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

from ..errors import InvalidCheckpoint

CHUNK_BYTES = 4 << 20
_PART = re.compile(r"(?P<whole>.+)\[(?P<lead>(?::,)*)(?P<ranges>\d+:\d+(?:;\d+:\d+)*)\]")


@dataclass(frozen=True)
class Part:
    """A part by name: ranges [start, stop) of an axis of `whole`."""

    whole: str
    axis: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Pieces:
    """What is taken of a tensor's bytes: of each of `rows` rows of `row` bytes the spans (first byte, how many)."""

    rows: int
    row: int
    spans: tuple[tuple[int, int], ...]


def part_of(name: str) -> Part | None:
    """A part from its name; None for the name of a whole."""
    found = _PART.fullmatch(name)
    if found is None:
        return None
    pairs = (each.split(":") for each in found["ranges"].split(";"))
    return Part(found["whole"], len(found["lead"]) // 2, tuple((int(start), int(stop)) for start, stop in pairs))


def read_into(file: RawIOBase, buffer: memoryview, path: Path) -> None:
    """Fill a buffer from an unbuffered file, in as many reads as the file system needs: some (FUSE, 9p, network ones)
    give less than they are asked for.

    Raises:
        InvalidCheckpoint: the file ends before.
    """
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])
        if not count:
            raise InvalidCheckpoint("the file became shorter while it was read", str(path),
                                    "export again once nothing else writes to the checkpoint",
                                    code="E-WEIGHTS-FILE-CHANGED")
        filled += count


def stored_pieces(path: Path, offset: int, pieces: Pieces) -> Iterator[memoryview]:
    """Pieces of a tensor that begins at `offset` of a file; each chunk is overwritten by the next.

    Raises:
        InvalidCheckpoint: the file ends before them.
    """
    buffer = memoryview(bytearray(CHUNK_BYTES))
    filled = 0
    with open(path, "rb", buffering=0) as file:
        for number in range(pieces.rows):
            for start, count in pieces.spans:
                file.seek(offset + number * pieces.row + start)
                while count:
                    size = min(count, len(buffer) - filled)
                    read_into(file, buffer[filled:filled + size], path)
                    filled, count = filled + size, count - size
                    if filled == len(buffer):
                        yield buffer
                        filled = 0
    if filled:
        yield buffer[:filled]


def made_pieces(value: Any, pieces: Pieces) -> Iterator[memoryview]:
    """Pieces of a torch tensor or numpy array in memory, or of an iterator of its parts along the first axis."""
    import numpy as np

    parts = [_flat(part) for part in (value if isinstance(value, Iterator) else (value,))]
    rows: Any = (np.concatenate(parts) if len(parts) > 1 else parts[0]).reshape(pieces.rows, pieces.row)
    step = max(1, CHUNK_BYTES // max(sum(count for _, count in pieces.spans), 1))
    for first in range(0, pieces.rows, step):
        some = rows[first:first + step]
        joined: Any = np.concatenate([some[:, start:start + count] for start, count in pieces.spans], axis=1)
        flat: Any = np.ascontiguousarray(joined).reshape(-1)
        yield memoryview(flat)


def _flat(value: Any) -> Any:
    import numpy as np

    if hasattr(value, "detach"):
        import torch

        return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)
