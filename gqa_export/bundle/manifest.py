"""The bundle: a folder with `model.onnx`, its weights, `gqa_export.json` and the tokenizer's files.

Written into a temporary sibling folder and renamed when complete, so that whatever stops an export leaves either
the old bundle or the new one. sha256 of every file we write is taken while writing. What a killed process left
half-written is taken up by the next export of the same (`leftovers`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..graph_io import TensorFact
from .engine_facts import EngineFacts
from ..errors import GqaExportError
from ..files.resume import JOURNAL, Journal, take_over
from .manifest_rules import check
from ..files.staging import check_folder, disk_errors, staging_folder
from ..spec import ModelSpec
from ..files.atomic_replace import move_files, replace_folder

MANIFEST = "gqa_export.json"
MODEL = "model.onnx"
DATA = "model.onnx.data"
FORMAT = 1
MOST_MANIFEST_BYTES = 1 << 26


@dataclass(frozen=True)
class Fallback:
    """A layer that the target's best op could not hold: what was wanted, what was used, why. layer -1: the model."""

    layer: int
    wanted: str
    used: str
    reason: str


@dataclass(frozen=True)
class FileFact:
    """A file of the bundle. Written by us: `sha256`. Linked or in place: `mtime_ns` and `header_sha256` (of the
    safetensors header) instead, and `sha256` only if asked for (`--hash`)."""

    size: int
    sha256: str = ""
    mtime_ns: int = 0
    header_sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """Everything a reader of a bundle may need, as `gqa_export.json`."""

    target: str
    dtype: str
    cache: str
    capacity: int
    logits: str
    weights: str
    spec: ModelSpec
    inputs: tuple[TensorFact, ...]
    outputs: tuple[TensorFact, ...]
    fallbacks: tuple[Fallback, ...] = ()
    files: dict[str, FileFact] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    """checkpoint (path or hub id), kind, stored dtype, max_positions and other facts of where it came from"""
    tokens: dict[str, Any] = field(default_factory=dict)
    """eos (list), bos, pad token ids; tokenizer: whether its files are here"""
    versions: dict[str, str] = field(default_factory=dict)
    bytes_copied: int = 0
    bytes_linked: int = 0
    engine: EngineFacts | None = None
    """of an engine bundle: its engine; None where the bundle holds a graph"""
    format: int = FORMAT

    def to_json(self) -> str:
        """Stable, readable JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST) -> Manifest:
        """Parse a manifest; anything malformed is a GqaExportError naming `where`."""
        fix = "export the bundle again with this version of gqa-export"
        try:
            data = json.loads(text, parse_constant=_no_constant)
            if data["format"] != FORMAT:
                raise GqaExportError(f"manifest format {data['format']!r} is not {FORMAT}", where, fix)
            check(data)
            data["spec"] = ModelSpec.from_dict(data["spec"])
            for name in ("inputs", "outputs"):
                data[name] = tuple(TensorFact(f["name"], f["dtype"], tuple(f["shape"])) for f in data[name])
            data["fallbacks"] = tuple(Fallback(**f) for f in data["fallbacks"])
            data["files"] = {name: FileFact(**fact) for name, fact in data["files"].items()}
            if data.get("engine") is not None:
                data["engine"] = EngineFacts.from_dict(data["engine"])
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise GqaExportError(f"not a valid bundle manifest: {type(error).__name__}: {error}", where, fix) from error


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of a bundle folder, or a GqaExportError."""
    path = Path(folder) / MANIFEST
    fix = "make one with `gqa-export onnx CHECKPOINT -o BUNDLE`"
    if not Path(folder).is_dir():
        raise GqaExportError("no such bundle folder", str(folder), fix)
    if not path.is_file():
        raise GqaExportError(f"the folder has no {MANIFEST}, so it is not a bundle", str(folder), fix)
    try:
        if path.stat().st_size > MOST_MANIFEST_BYTES:
            raise GqaExportError(f"a manifest of {path.stat().st_size} bytes", str(path), "do not use this bundle")
        return Manifest.from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise GqaExportError(f"cannot read the manifest: {error.strerror}", str(path),
                             "check its permissions") from error
    except UnicodeDecodeError as error:
        raise GqaExportError(f"not a valid bundle manifest: {error}", str(path), fix) from error


class HashingFile:
    """A file being written whose sha256 is known when it is closed. `tell()` is the number of bytes written.

    key: what decides its bytes. With one, a journal is kept, and what a killed process left of the same file (in one
    of `leftovers`) is taken over: `tell()` is then not 0 at the start, but at an offset that was passed to `mark`.
    """

    def __init__(self, path: Path, key: str = "", leftovers: Iterable[Any] = ()) -> None:
        self.path, self.size, self._hash = path, 0, hashlib.sha256()
        self._journal = None
        if key:
            self.size, self._hash = take_over(leftovers, path.name, key, path)
            self._journal = Journal(path.with_name(path.name + JOURNAL), key)
            self.mark()
        self._file = open(path, "ab" if self.size else "xb")  # noqa: SIM115 closed by close()

    def mark(self) -> None:
        """A place where writing could be taken up again."""
        if self._journal is not None:
            if hasattr(self, "_file"):
                self._file.flush()
            self._journal.note(self.size, self._hash)

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        self._hash.update(data)
        self._file.write(data)
        self.size += len(data) if isinstance(data, bytes) else data.nbytes
        return self.size

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    def close(self) -> FileFact:
        """Close and say what was written."""
        self._file.close()
        if self._journal is not None:
            self._journal.close()
        return FileFact(self.size, self._hash.hexdigest())


class BundleWriter:
    """Collects the files of one bundle in a staging folder. Use through `writing_bundle`."""

    def __init__(self, staging: Path, leftovers: Iterable[Any] = ()) -> None:
        self.staging, self.leftovers = staging, tuple(leftovers)
        self.files: dict[str, FileFact] = {}

    @contextmanager
    def open(self, name: str, key: str = "") -> Iterator[HashingFile]:
        """Write one file, hashed on the way. key: see `HashingFile`."""
        file = HashingFile(self.staging / name, key, self.leftovers)
        try:
            yield file
        finally:
            fact = file.close()
        self.files[name] = fact

    def write(self, name: str, content: bytes) -> None:
        """Write one whole file."""
        with self.open(name) as file:
            file.write(content)

    def copy(self, source: Path, name: str) -> None:
        """Copy one small file (tokenizer, config)."""
        self.write(name, Path(source).read_bytes())

    def record(self, name: str, fact: FileFact) -> None:
        """Note a file that we did not write (linked or already in place)."""
        self.files[name] = fact

    def finish(self, manifest: Manifest) -> Manifest:
        """Write the manifest, last, with the facts of every file."""
        manifest = replace(manifest, files=dict(self.files))
        (self.staging / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return manifest


@contextmanager
def writing_bundle(output: Path, *, force: bool = False, inplace: bool = False) -> Iterator[BundleWriter]:
    """Stage a bundle for `output`; on success it appears there at once, on any failure nothing of it stays.

    inplace: `output` is an existing checkpoint folder; new files are moved into it one by one, the manifest last,
    and none that exists may be replaced unless it is a file of an earlier bundle and `force` is given.
    Raises GqaExportError for a non-empty output without `force`, an unwritable place, a full disk.
    """
    output = Path(os.path.abspath(output))
    if not inplace:
        check_output(output, force)
    parent = output if inplace else output.parent
    with disk_errors(output), staging_folder(output, parent) as (staging, leftovers):
        yield BundleWriter(staging, leftovers)
        if inplace:
            _move_into(staging, output, force)
        else:
            replace_folder(staging, output)


def check_output(output: Path, force: bool) -> None:
    """Refuse, before any work, an output that must not be replaced."""
    check_folder(output, force=force, marker=MANIFEST)


def _move_into(staging: Path, output: Path, force: bool) -> None:
    names = sorted(p.name for p in staging.iterdir() if p.name != MANIFEST)
    ours = set(read_manifest(output).files) if (output / MANIFEST).is_file() else set()
    for name in names + [MANIFEST]:
        if (output / name).exists() and not (force and (name in ours or name == MANIFEST)):
            raise GqaExportError(f"{name} exists in the checkpoint folder and would be replaced", str(output),
                                 "remove it, or pass --force if it came from an earlier export")
    move_files([*names, MANIFEST], staging, output)
