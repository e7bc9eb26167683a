"""Writes safetensors files from sources, a few megabytes at a time: 8 bytes of length, a JSON header, the tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.safetensors_header import DTYPES
from ..weights.dtypes import itemsize
from ..weights.source_kinds import Source

NAMES = {name: stored for stored, (name, _) in DTYPES.items()}
"""numpy (or ml_dtypes) name -> safetensors name"""


def size_of(source: Source) -> int:
    """Bytes of a tensor."""
    return math.prod(source.shape) * itemsize(source.dtype)


def write_safetensors(path: Path, tensors: Mapping[str, Source], on_bytes: Callable[[int], None]) -> None:
    """Write one file, tensors in the given order (wider types first, so that all lie aligned)."""
    order = sorted(tensors, key=lambda name: -itemsize(tensors[name].dtype))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in order:
        source = tensors[name]
        header[name] = {"dtype": NAMES[source.dtype], "shape": list(source.shape),
                        "data_offsets": [place, place + size_of(source)]}
        place += size_of(source)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            for chunk in tensors[name].chunks():
                file.write(chunk)
                on_bytes(chunk.nbytes)
