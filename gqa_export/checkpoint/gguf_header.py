"""The header of a GGUF file: metadata, and the name, type, shape and place of each tensor. No weights.

Long lists and lists of texts in the metadata (the vocabulary) are skipped, which is why this takes milliseconds; the
package gguf reads every entry. Whatever contradicts itself is refused here, because later stages read by offset.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidCheckpoint
from .safetensors_header import DAMAGED

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
LONGEST_LIST = 4096
"""values of a list that is kept; one value a layer fits, one a token does not"""
_PLAIN = {0: "float32", 1: "float16", 30: "bfloat16"}


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        metadata: scalars, texts and short lists of numbers by full key; None for every other list.
        tensors: name -> (ggml type number, shape in torch order).
        places: name -> (file, offset of its first byte in it).
        files: the file, or the parts of a model in parts, in order.
    """

    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, tuple[int, ...]]]
    places: dict[str, tuple[Path, int]] = field(default_factory=dict, repr=False)
    files: tuple[Path, ...] = ()

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.metadata.get("general.architecture", ""))

    def about_model(self, suffix: str) -> Any:
        """Metadata `<architecture>.<suffix>`, None when it is not there."""
        return self.metadata.get(f"{self.architecture}.{suffix}")

    @property
    def stored_dtype(self) -> str:
        """The float type of the matrices; float32 for a quantized file, which is what it is dequantized to."""
        kinds = {kind for kind, shape in self.tensors.values() if len(shape) > 1}
        return _PLAIN.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse and check the header of a GGUF file.

    Args:
        path: the .gguf file; only its header is read.

    Raises:
        InvalidCheckpoint: the file is not GGUF, is damaged, is shorter than its header claims, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise InvalidCheckpoint("this is not a GGUF file: it does not begin with the four letters GGUF",
                                        str(path), "give a .gguf file, or the folder of a Hugging Face checkpoint",
                                        code="E-CKPT-GGUF-MAGIC")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except (ValueError, struct.error, OverflowError) as error:
        raise InvalidCheckpoint(f"the GGUF file is not valid: {error}", str(path), DAMAGED,
                                code="E-CKPT-GGUF-HEADER") from error
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read the file: {error.strerror}", str(path), "check its permissions",
                                code="E-CKPT-UNREADABLE") from error


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 4

    def take(self, form: str) -> Any:
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values[0] if len(values) == 1 else values

    def text(self) -> str:
        length = self.take("<Q")
        if self.at + length > len(self.data):
            raise ValueError(f"a text of {length} bytes reaches beyond the end of the file")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"metadata has the unknown type {kind}")
        inner, count = self.take("<IQ")
        if count > len(self.data):
            raise ValueError(f"a list of {count} values cannot fit into the file")
        if inner in _SCALARS and count <= LONGEST_LIST:
            return [self.take(_SCALARS[inner]) for _ in range(count)]
        if inner in _SCALARS:
            self.at += struct.calcsize(_SCALARS[inner]) * count
        elif inner == _STRING:
            for _ in range(count):
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
        else:
            raise ValueError(f"a list of metadata has the type {inner}, which is not supported")
        return None

    def header(self) -> GgufHeader:
        version, tensor_count, metadata_count = self.take("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, expected 2 or 3")
        metadata: dict[str, Any] = {}
        if max(tensor_count, metadata_count) > len(self.data):
            raise ValueError(f"{tensor_count} tensors and {metadata_count} metadata cannot fit into the file")
        for _ in range(metadata_count):
            key = self.text()
            if key in metadata:
                raise ValueError(f"the metadata {key!r} occurs twice")
            metadata[key] = self.value(self.take("<I"))
        tensors, places = {}, []
        for _ in range(tensor_count):
            name, dims = self.text(), self.take("<I")
            if dims > 8:
                raise ValueError(f"tensor {name!r} has {dims} dimensions")
            shape = tuple(reversed(struct.unpack_from(f"<{dims}Q", self.data, self.at)))
            self.at += 8 * dims
            kind, offset = self.take("<IQ")
            if name in tensors:
                raise ValueError(f"tensor {name!r} occurs twice")
            tensors[name] = (kind, shape)
            places.append((offset, name, _bytes(kind, math.prod(shape))))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"its alignment {alignment!r} is not a power of two from 8 to {1 << 20}")
        start, place = -(-self.at // alignment) * alignment, 0
        for offset, name, size in sorted(places):
            if offset < place or offset % alignment:
                raise ValueError(f"tensor {name!r} at {offset} is not aligned, or overlaps the one before it")
            place = offset + size
            if start + offset + size > len(self.data):
                raise InvalidCheckpoint(f"tensor {name!r} ends at byte {start + offset + size}, but the file has "
                                        f"{len(self.data)}", str(self.path), DAMAGED, code="E-CKPT-TRUNCATED")
        return GgufHeader(metadata, tensors, {name: (self.path, start + offset) for offset, name, _ in places},
                          (self.path,))


def _bytes(kind: int, count: int) -> int:
    """The bytes that so many values of a ggml type take."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if count % elements:
        raise ValueError(f"{count} values do not fill whole blocks of {elements}")
    return count // elements * size
