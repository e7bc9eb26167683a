"""Where every tensor of a safetensors file lies: a strict reader of the header, which touches no weights.

The format: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}},
then the tensors without holes or overlap. Source: https://github.com/huggingface/safetensors#format. Whatever does
not hold is refused here, because later stages read by offset and would otherwise export noise. (The package
safetensors gives tensors, not their offsets.)
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidCheckpoint
from .mistaken import refuse_lfs

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1), "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
}  # fmt: skip
"""safetensors name -> numpy (or ml_dtypes) name and bytes per element"""
DAMAGED = "the file is truncated or damaged: download or copy it again and compare its size with the original's"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        path: the file.
        offset: of its first byte, from the start of the file.
        nbytes: of its little-endian elements.
        dtype: numpy (ml_dtypes) name.
        shape: as stored.
    """

    path: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of one safetensors file, by name; no weights are read.

    Raises:
        InvalidCheckpoint: the file cannot be read, or its header is not exactly what the format requires; the message
            names the entry.
    """
    refuse_lfs(path)
    try:
        size, text = _header_bytes(path)
        entries = json.loads(text, object_pairs_hook=_no_duplicates)
        if not isinstance(entries, dict):
            raise ValueError("the header is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise _invalid(str(error), path, code="E-CKPT-HEADER-JSON") from error
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read the file: {error.strerror}", str(path), "check its permissions",
                                code="E-CKPT-UNREADABLE") from error
    data = 8 + len(text)
    tensors = {name: _tensor(path, data, size, name, entry) for name, entry in entries.items()
               if name != "__metadata__"}
    _check_layout(path, tensors, data, size)
    return tensors


def _invalid(reason: str, path: Path, code: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(f"the safetensors file is not valid: {reason}", str(path), DAMAGED, code=code)


def header_sha256(path: Path) -> str:
    """sha256 of a safetensors file's header (length prefix included): a cheap identity of a file not hashed whole.

    Raises:
        InvalidCheckpoint: the file is shorter than its header.
    """
    _, text = _header_bytes(path)
    return hashlib.sha256(struct.pack("<Q", len(text)) + text).hexdigest()


def _header_bytes(path: Path) -> tuple[int, bytes]:
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _invalid(f"it is only {size} bytes long", path, code="E-CKPT-TRUNCATED")
        length = struct.unpack("<Q", prefix)[0]
        if length > MAX_HEADER_BYTES:
            raise _invalid(f"its header claims {length} bytes, more than the format allows", path,
                           code="E-CKPT-HEADER-LENGTH")
        if 8 + length > size:
            raise _invalid(f"its header claims {length} bytes, but the file has {size} in all", path,
                           code="E-CKPT-TRUNCATED")
        return size, file.read(length)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} occurs twice in the header")
    return dict(pairs)


def _tensor(path: Path, data: int, size: int, name: str, entry: Any) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _invalid(f"the entry of tensor {name!r} does not consist of dtype, shape and data_offsets", path,
                       code="E-CKPT-HEADER-ENTRY")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _invalid(f"tensor {name!r} has the unknown dtype {dtype!r}", path, code="E-CKPT-HEADER-DTYPE")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _invalid(f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}, expected lists of counts",
                       path, code="E-CKPT-HEADER-SHAPE")
    begin, end = offsets
    dtype_name, item = DTYPES[dtype]
    if end - begin != math.prod(shape) * item:
        raise _invalid(f"tensor {name!r} of shape {shape} and dtype {dtype} cannot have {end - begin} bytes", path,
                       code="E-CKPT-HEADER-SIZE")
    if data + end > size:
        raise _invalid(f"tensor {name!r} ends at byte {data + end}, but the file has {size}", path,
                       code="E-CKPT-TRUNCATED")
    return StoredTensor(path, data + begin, end - begin, dtype_name, tuple(shape))


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(path: Path, tensors: dict[str, StoredTensor], data: int, size: int) -> None:
    place = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < place:
            raise _invalid(f"tensor {name!r} overlaps the one before it", path, code="E-CKPT-HEADER-OVERLAP")
        if tensor.offset > place:
            raise _invalid(f"{tensor.offset - place} unexplained bytes lie before tensor {name!r}", path,
                           code="E-CKPT-HEADER-HOLE")
        place += tensor.nbytes
    if place != size:
        raise _invalid(f"the file has {size} bytes, its header explains {place}", path, code="E-CKPT-HEADER-HOLE")
