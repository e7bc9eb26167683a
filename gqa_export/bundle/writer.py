"""Writing a bundle: staged beside its place and renamed when complete, so that whatever stops an export leaves either
the old bundle or the new one. sha256 of every file we write is taken while writing. What a killed process left
half-written is taken up by the next export of the same (`files.resume`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import GqaExportError
from ..files.atomic_replace import move_files, replace_folder, sync
from ..files.resume import JOURNAL, Journal, take_over
from ..files.staging import check_folder, claimed_leftovers, disk_errors, named, staging_folder
from .integrity import check_no_code
from .manifest import MANIFEST, FileFact, Manifest, read_manifest


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

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        self._file.flush()
        sync(self.path)

    def close(self) -> FileFact:
        """Close; size and sha256 of what was written."""
        try:
            self._file.close()
        finally:
            if self._journal is not None:
                self._journal.close()
        return FileFact(self.size, self._hash.hexdigest())


class BundleWriter:
    """Collects the files of one bundle in a staging folder. Use through `writing_bundle`."""

    def __init__(self, staging: Path, leftovers: Iterable[Any] = (), lost: tuple[str, ...] = ()) -> None:
        self.staging, self.leftovers, self._lost = staging, tuple(leftovers), lost
        self.files: dict[str, FileFact] = {}

    @contextmanager
    def open(self, name: str, key: str = "") -> Iterator[HashingFile]:
        """Write one file, hashed on the way. key: see `HashingFile`."""
        file = self.begin(name, key)
        try:
            yield file
        finally:
            fact = file.close()
        self.files[name] = fact

    def begin(self, name: str, key: str = "") -> HashingFile:
        """A file that the caller closes, and records if it is to be one of the bundle's. key: see `HashingFile`."""
        if "/" in name:  # the staging folder itself is made once: where it is gone nothing is written any more
            (self.staging / name).parent.mkdir(exist_ok=True)
        return HashingFile(self.staging / name, key, self.leftovers)

    def write(self, name: str, content: bytes) -> None:
        """Write one whole file."""
        with self.open(name) as file:
            file.write(content)

    def copy(self, source: Path, name: str) -> None:
        """Copy one small file (tokenizer, config)."""
        self.write(name, Path(source).read_bytes())

    def record(self, name: str, fact: FileFact) -> None:
        """Note a file that was not written by `open` (linked, already in place, written ahead)."""
        self.files[name] = fact

    @property
    def notes(self) -> list[str]:
        """What a user must know of what this bundle replaces."""
        return [f"--force replaced the old bundle, and removed what its manifest did not list: {named(self._lost)}"] \
            if self._lost else []

    def finish(self, manifest: Manifest) -> Manifest:
        """Write the manifest, last, with the facts of every file."""
        manifest = replace(manifest, files=dict(self.files))
        (self.staging / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return manifest


@contextmanager
def staged_bundle(output: Path, *, inplace: bool = False, claim: bool = True) -> Iterator[BundleWriter]:
    """A writer into a staging folder for `output`, of which nothing stays; see `writing_bundle`. claim: False leaves
    what killed processes left to `writing_bundle`, so that it outlives an export that is refused before."""
    output = Path(os.path.abspath(output))
    with staging_folder(output, output if inplace else output.parent, claim=claim) as (staging, leftovers):
        yield BundleWriter(staging, leftovers, () if inplace else foreign_files(output))


@contextmanager
def _continued(writer: BundleWriter, output: Path) -> Iterator[BundleWriter]:
    """`writer`, which from here on may take over what killed processes left."""
    with claimed_leftovers(output, output.parent) as leftovers:
        writer.leftovers = tuple(leftovers)
        yield writer


@contextmanager
def writing_bundle(output: Path, *, force: bool = False, inplace: bool = False,
                   begun: BundleWriter | None = None) -> Iterator[BundleWriter]:
    """Stage a bundle for `output`; on success it appears there at once, on any failure nothing of it stays.

    Args:
        output: the bundle's folder.
        force: replace an earlier result.
        inplace: `output` is an existing checkpoint folder; new files are moved into it one by one, the manifest last,
            and none that exists may be replaced unless it is a file of an earlier bundle and `force` is given.
        begun: of a `staged_bundle` for the same output that claims nothing; None stages one.

    Raises:
        GqaExportError: the output is not empty (without `force`) or cannot be written, or the disk is full.
        InvalidBundle: the checkpoint folder holds Python files, which a bundle may not.
    """
    output = Path(os.path.abspath(output))
    if inplace:
        check_no_code(output)
    else:
        check_output(output, force)
    with disk_errors(output), _continued(begun, output) if begun else \
            staged_bundle(output, inplace=inplace) as writer:
        yield writer
        if inplace:
            _move_into(writer.staging, output, force)
        else:
            replace_folder(writer.staging, output)


def check_output(output: Path, force: bool) -> None:
    """Refuse, before any work, an output that must not be replaced."""
    check_folder(output, force=force, marker=MANIFEST, lost=foreign_files(output))


def foreign_files(output: Path) -> tuple[str, ...]:
    """Files in the folder of an earlier bundle that its manifest does not list, sorted; () where there is no bundle."""
    if output.is_symlink() or not (output / MANIFEST).is_file():
        return ()
    try:
        ours = {MANIFEST, *read_manifest(output).files}
    except GqaExportError:
        ours = {MANIFEST}  # it cannot be read: all are named
    there = (Path(place, name).relative_to(output).as_posix() for place, _, names in os.walk(output) for name in names)
    return tuple(sorted(name for name in there if name not in ours))


def _move_into(staging: Path, output: Path, force: bool) -> None:
    names = sorted(p.name for p in staging.iterdir() if p.name != MANIFEST)
    ours = set(read_manifest(output).files) if (output / MANIFEST).is_file() else set()
    for name in names + [MANIFEST]:
        if (output / name).exists() and not (force and (name in ours or name == MANIFEST)):
            raise GqaExportError(f"{name} exists in the checkpoint folder and would be replaced", str(output),
                                 "remove it, or pass --force if it came from an earlier export", code="E-FILE-EXISTS")
    move_files([*names, MANIFEST], staging, output)
