"""A GGUF model that is stored in several files, read as one.

Source: llama.cpp's `gguf-split`: parts are named `NAME-00001-of-0000N.gguf`; each has `split.no` (from 0) and
`split.count`, the first one the metadata of the whole model.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InvalidCheckpoint
from .gguf_header import GgufHeader, read_gguf_header

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MOST_PARTS = 99_999
"""what fits into a name"""
FIX = "put all parts of the model into one folder, with the names they had, and give any one of them"


def read_gguf(path: Path) -> GgufHeader:
    """The header of a GGUF model, whatever the number of its files.

    Args:
        path: the file, or any one of its parts; the others are looked for beside it.

    Raises:
        InvalidCheckpoint: a file is damaged, or the parts are not those of one model.
    """
    header = read_gguf_header(path)
    named = PART.fullmatch(path.name)
    count = header.metadata.get("split.count", int(named["count"]) if named else 1)
    if type(count) is not int or not 0 <= count <= MOST_PARTS:
        raise _broken(f"split.count is {count!r}, expected a number of parts up to {MOST_PARTS}", path)
    if count <= 1:
        return header
    parts: dict[int, GgufHeader] = {}
    for place, number in _candidates(path, count):
        part = header if place == path else read_gguf_header(place)
        if part.metadata.get("split.count", count if named else 1) != count:
            if named:
                raise _broken(f"{place.name} is one of {part.metadata['split.count']} parts and {path.name} is one of "
                              f"{count}", path)
            continue
        number = part.metadata.get("split.no", number)
        if type(number) is not int or not 0 <= number < count:
            raise _broken(f"{place.name} has split.no {number!r}, expected a number from 0 to {count - 1}", path)
        if number in parts:
            raise _broken(f"{place.name} and {parts[number].files[0].name} are both part {number + 1} of {count}", path)
        parts[number] = part
    missing = [number + 1 for number in range(count) if number not in parts]
    if missing:
        raise _broken(f"the model has {count} parts, and part {missing[0]} of them is not here", path)
    return _joined([parts[number] for number in range(count)], path)


def gguf_of_folder(folder: Path) -> Path | None:
    """The first part of a model in parts, if all GGUF files of a folder are its parts; else None.

    Raises:
        InvalidCheckpoint: as `read_gguf`.
    """
    there = sorted(folder.glob("*.gguf"))
    if len(there) < 2:
        return there[0] if there and PART.fullmatch(there[0].name) else None
    first = there[0]
    if not PART.fullmatch(first.name) and "split.count" not in read_gguf_header(first).metadata:
        return None
    files = read_gguf(first).files
    return files[0] if set(files) == set(there) else None


def _candidates(path: Path, count: int) -> list[tuple[Path, int]]:
    """The files that may be parts of the same model, with the numbers that their names give them."""
    named = PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        return [(place, -1) for place in sorted(path.parent.glob("*.gguf"))]
    places = [path.with_name(f"{named['stem']}-{number + 1:05d}-of-{count:05d}.gguf") for number in range(count)]
    return [(place, number) for number, place in enumerate(places) if place.is_file()]


def _joined(parts: list[GgufHeader], path: Path) -> GgufHeader:
    metadata: dict[str, Any] = {}
    tensors: dict[str, tuple[int, tuple[int, ...]]] = {}
    places: dict[str, tuple[Path, int]] = {}
    for part in parts:
        name = part.files[0].name
        for key, value in part.metadata.items():
            if key.startswith("split.") and key != "split.tensors.count":
                continue
            if metadata.setdefault(key, value) != value:
                raise _broken(f"{name} has {key} {value!r}, and a part before it {metadata[key]!r}", path)
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise _broken(f"{name} has tensor {min(twice)!r}, and so has a part before it", path)
        tensors.update(part.tensors)
        places.update(part.places)
    promised = metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise _broken(f"the parts have {len(tensors)} tensors, and their metadata promises {promised}", path)
    return replace(parts[0], metadata=metadata, tensors=tensors, places=places,
                   files=tuple(part.files[0] for part in parts))


def _broken(what: str, path: Path) -> InvalidCheckpoint:
    return InvalidCheckpoint(what, str(path), FIX, code="E-CKPT-GGUF-PARTS")
