"""The plugin's identity and serialized fields, one definition for Python and C++. Standard library only.

Identity: op `GroupedQueryAttention`, version "1", "2" or "3", namespace "gqa". An ONNX node carries them as domain
"gqa" (or the string attributes `plugin_version` and `plugin_namespace`). Version 2 is version 1 with the attributes and
tables of `gqa::LongGroupedQueryAttention`; `method` 0 is exact attention, as in version 1. Version 3 is version 1 with
the attributes of version 2 of the op: its cache holds codes. All are registered side by side: an engine of version 1
runs as it did, and a graph that neither approximates nor quantizes its cache is still written in version 1.

**Node.** Inputs are those of `gqa_export.attention_op.INPUTS`, in that order, only the present ones (TensorRT refuses
holes): `key` and `value` if has_new, `cos` and `sin` if has_rotary, `sinks` if has_sinks, then `fractions` and
`code_order` (int32 here) and `projections` (fp32) if method is not 0. Outputs: `output`, and, if has_new,
`present_key` and `present_value`, which are the memory of `past_key` and `past_value`.

**Creation fields** (ONNX attributes, all of length 1, all required): `CREATION_OF` below, by version.

**Serialized fields**: the creation fields, then `SERIALIZED_ONLY`, in this order:

    contract_version  int32   of the op: 1, and 2 for version 3 of the plugin; any other value is refused
    keys              char    the kernels this layer launches, ASCII, one line each:  KERNEL CAPABILITY SHA256\\n
                              KERNEL append | prefill | decode | combine | score | select | long_prefill;
                              CAPABILITY 89 is 8.9; SHA256 (64 lower-case hexadecimal digits) of the whole .gqacubin
                              file (`gqa_plugins.grouped_attention.cubin`)
    cubins            char    a container (below); absent on every layer but the one that carries them

Readers find fields by name and ignore none: an unknown name is refused, so is a missing one (but `cubins`).

**Container**: a text header, an empty line, then the files one after another, in the header's order:

    gqa-cubins 1\\n
    SHA256 BYTES\\n            one line per file, sorted by SHA256; BYTES decimal
    \\n
    file file file ...        exactly as long as the header says; nothing follows

TensorRT stores a layer's fields once per optimization profile and restores layers in an order of its own, so one layer
carries every cubin of the engine and the others only name theirs: whoever restores a layer puts its container into a
store of the process, and kernels are looked up there when the first one is launched, after all layers were restored.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gqa_export import long_attention_op
from gqa_export.attention_op import (
    ATTRIBUTES,
    CODE_ATTRIBUTES,
    CODES_PLUGIN_VERSION,
    CODES_VERSION,
    DOMAIN,
    OP,
    OUTPUT_NAMES,
    VERSION,
    Attribute,
)
from gqa_export.errors import InvalidBundle

NAME = OP
PLUGIN_VERSION, LONG_VERSION = "1", "2"
NAMESPACE = DOMAIN
MAGIC = b"gqa-cubins 1"
KERNELS = ("append", "prefill", "decode", "combine", "score", "select", "long_prefill")
KEY_LINE = re.compile(rf"({'|'.join(KERNELS)}) ([0-9]+) ([0-9a-f]{{64}})")
REBUILD = "build the engine again with `gqa-export trt`"

FLAGS = ("has_rotary", "has_sinks", "has_new")


def _fields_of(attributes: Iterable[Attribute]) -> tuple[tuple[str, str], ...]:
    return tuple((attribute.name, "int32" if attribute.type == "int" else "float32") for attribute in attributes)


# (name, "int32" | "float32" | "char"), in order.
CREATION: tuple[tuple[str, str], ...] = (*_fields_of(ATTRIBUTES), *((flag, "int32") for flag in FLAGS))
SERIALIZED_ONLY: tuple[tuple[str, str], ...] = (("contract_version", "int32"), ("keys", "char"), ("cubins", "char"))
SERIALIZED = CREATION + SERIALIZED_ONLY
LONG_CREATION = CREATION + tuple((name, "int32") for name in long_attention_op.OWN_ATTRIBUTES)
CREATION_OF = {PLUGIN_VERSION: CREATION, LONG_VERSION: LONG_CREATION,
               CODES_PLUGIN_VERSION: CREATION + _fields_of(CODE_ATTRIBUTES)}
"""version of the plugin -> its creation fields"""
CONTRACT_OF = {PLUGIN_VERSION: VERSION, LONG_VERSION: VERSION, CODES_PLUGIN_VERSION: CODES_VERSION}
"""version of the plugin -> of the op that it computes"""
SERIALIZED_OF = {version: creation + SERIALIZED_ONLY for version, creation in CREATION_OF.items()}
OPTIONAL = ("cubins",)
FLAG_OF_INPUT = {"key": "has_new", "value": "has_new", "cos": "has_rotary", "sin": "has_rotary", "sinks": "has_sinks",
                 "fractions": "method", "projections": "method", "code_order": "method"}


def node_inputs(flags: Mapping[str, int | float]) -> tuple[str, ...]:
    """Names of a node's inputs, in order, given its `has_*` attributes."""
    return tuple(name for name in long_attention_op.INPUT_NAMES
                 if name not in FLAG_OF_INPUT or flags.get(FLAG_OF_INPUT[name], 0))


def node_outputs(flags: Mapping[str, int | float]) -> tuple[str, ...]:
    """Names of a node's outputs, in order."""
    return OUTPUT_NAMES if flags["has_new"] else OUTPUT_NAMES[:1]


@dataclass(frozen=True, order=True)
class Key:
    """One kernel that a layer launches: which of `KERNELS`, the capability (89), the sha256 of its .gqacubin file."""

    kernel: str
    capability: int
    sha256: str


def keys_text(keys: Iterable[Key]) -> bytes:
    """The `keys` field, sorted by kernel and capability."""
    return "".join(f"{key.kernel} {key.capability} {key.sha256}\n" for key in sorted(keys)).encode("ascii")


def parse_keys(data: bytes, where: str = "plugin field keys") -> tuple[Key, ...]:
    """Read `keys_text` back. Raises GqaExportError for anything else."""
    found = []
    lines = data.decode("ascii", errors="replace").split("\n")
    for line in lines[:-1]:
        match = KEY_LINE.fullmatch(line)
        if match is None:
            raise InvalidBundle(f"the engine names a kernel in a way that is not understood: {line[:80]!r}", where,
                                REBUILD, code="E-ENGINE-KERNEL-KEYS")
        found.append(Key(match[1], int(match[2]), match[3]))
    if lines[-1]:
        raise InvalidBundle("the engine's list of kernels is cut short", where, REBUILD, code="E-ENGINE-KERNEL-KEYS")
    return tuple(found)


def check_contract_version(version: int, where: str = "plugin field contract_version",
                           plugin_version: str = PLUGIN_VERSION) -> None:
    """Refuse a layer that was serialized for another version of the op than a version of the plugin computes."""
    if version != CONTRACT_OF[plugin_version]:
        raise InvalidBundle(f"the engine's attention layers follow version {version} of the op, this plugin follows "
                            f"{CONTRACT_OF[plugin_version]}", where,
                            f"{REBUILD} of this version, or load it with the plugin it was built with",
                             code="E-ENGINE-OP-VERSION")


def pack(files: Iterable[bytes]) -> bytes:
    """A container of .gqacubin files; equal files are carried once."""
    named = dict(sorted((hashlib.sha256(data).hexdigest(), data) for data in files))
    header = b"".join(f"{name} {len(data)}\n".encode("ascii") for name, data in named.items())
    return MAGIC + b"\n" + header + b"\n" + b"".join(named.values())


def unpack(container: bytes, where: str = "plugin field cubins") -> dict[str, bytes]:
    """sha256 -> file. Raises GqaExportError unless the container is whole and every file has its sha256."""
    header, separator, rest = container.partition(b"\n\n")
    lines = header.split(b"\n")
    if lines[0] != MAGIC or not separator:
        raise InvalidBundle(f"the engine's kernels are not in a container of this version: it does not begin with "
                            f"'{MAGIC.decode()}'", where, REBUILD, code="E-ENGINE-KERNEL-CONTAINER")
    files, start = {}, 0
    for line in lines[1:]:
        match = re.fullmatch(rb"([0-9a-f]{64}) ([0-9]+)", line)
        if match is None:
            raise InvalidBundle("the header of the engine's kernels is damaged", where, REBUILD,
                                 code="E-ENGINE-KERNEL-CONTAINER")
        name, size = match[1].decode(), int(match[2])
        data = rest[start:start + size]
        if hashlib.sha256(data).hexdigest() != name:
            raise InvalidBundle(f"the engine's kernel {name[:12]} is cut short or altered", where, REBUILD,
                                 code="E-ENGINE-KERNEL-CONTAINER")
        files[name], start = data, start + size
    if start != len(rest):
        raise InvalidBundle(f"{len(rest) - start} bytes follow the engine's kernels", where, REBUILD,
                             code="E-ENGINE-KERNEL-CONTAINER")
    return files


class CubinStore:
    """The kernels that this process has seen, by sha256. Filled layer by layer, asked at the first launch."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def add(self, container: bytes) -> None:
        """Put every file of a container in. Raises GqaExportError for a damaged one; then nothing of it is kept."""
        files = unpack(container)
        with self._lock:
            self._files.update(files)

    def get(self, sha256: str) -> bytes:
        """The file, or a GqaExportError that says why it is not there."""
        with self._lock:
            data = self._files.get(sha256)
        if data is None:
            raise InvalidBundle(f"kernel {sha256[:12]} is in no layer that was loaded: the engine's carrying layer is "
                                "missing or was not restored", "plugin field cubins", REBUILD,
                                 code="E-ENGINE-KERNEL-ABSENT")
        return data


STORE = CubinStore()
