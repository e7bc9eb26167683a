"""A folder that appears complete or not at all: staged beside its place, renamed at the end."""

from __future__ import annotations

import atexit
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import GqaExportError
from .atomic_replace import replace_folder, undisturbed
from .resume import Claimed, abandoned, remove, stage

_unfinished: list[Claimed] = []


@atexit.register
def tidy_up() -> None:
    """Remove the staging folders of this process: Ctrl-C may strike between two lines, where no `finally` is near."""
    with undisturbed():
        remove(_unfinished)
        _unfinished.clear()


def check_folder(output: Path, *, force: bool, marker: str, lost: Sequence[str] = ()) -> None:
    """Check, before any work, that an output may be written: `force` replaces folders that hold the file `marker`.

    lost: names of files in it that are not of that result and would go too.

    Raises:
        GqaExportError: the output is not a folder, or is not empty and may not be replaced.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise GqaExportError("the output exists and is not a folder", str(output), "choose another path with -o",
                             code="E-FILE-NOT-A-FOLDER")
    if output.is_dir() and any(output.iterdir()):
        if not force:
            raise GqaExportError("the output folder is not empty", str(output),
                                 "choose another one, or pass --force to replace an earlier result"
                                 + (f"; this removes {named(lost)} as well" if lost else ""), code="E-FILE-NOT-EMPTY")
        if not (output / marker).is_file():
            raise GqaExportError(f"the output folder holds something else (it has no {marker})", str(output),
                                 "choose another one: --force replaces results of the same command only",
                                 code="E-FILE-FOREIGN")


def named(files: Sequence[str]) -> str:
    """The first five of these names, and how many more there are."""
    return ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")


@contextmanager
def staging_folder(output: Path, parent: Path, *, claim: bool = True) -> Iterator[tuple[Path, list[Claimed]]]:
    """(an empty hidden folder in `parent`, named after `output`; what killed processes left of the same). All of it is
    gone at the end, however that comes; what a kill leaves, the next one removes. `parent` is made, and stays if the
    block ends well. claim: False leaves alone what killed processes left, and gives none of it."""
    new = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    mine: list[Claimed] = []
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with undisturbed():
            if claim:
                mine += abandoned(parent / output.name)
            leftovers = list(mine)
            mine.append(stage(output, parent))
            _unfinished.extend(mine)
        staging = mine[-1][0]
        staging.chmod(0o755)
        yield staging, leftovers
        new.clear()
    finally:
        with undisturbed():
            _drop(mine)
            for folder in new:
                with suppress(OSError):  # somebody else put something there
                    folder.rmdir()


@contextmanager
def claimed_leftovers(output: Path, parent: Path) -> Iterator[list[Claimed]]:
    """What killed processes left in `parent` of the same output; it is gone at the end, however that comes."""
    mine: list[Claimed] = []
    try:
        with undisturbed():
            mine += abandoned(parent / output.name)
            _unfinished.extend(mine)
        yield list(mine)
    finally:
        with undisturbed():
            _drop(mine)


def _drop(mine: list[Claimed]) -> None:
    remove(mine)
    _unfinished[:] = [one for one in _unfinished if one not in mine]


@contextmanager
def writing_folder(output: Path, *, force: bool = False, marker: str) -> Iterator[Path]:
    """Give a staging folder; when the block ends well it becomes `output`, else nothing of it stays.

    Raises:
        GqaExportError: the output must not be replaced or cannot be written, or the disk is full.
    """
    output = Path(os.path.abspath(output))
    check_folder(output, force=force, marker=marker)
    with disk_errors(output), staging_folder(output, output.parent) as (staging, _):
        yield staging
        replace_folder(staging, output)


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """A full disk or an unwritable place inside the block is a GqaExportError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise GqaExportError("the disk is full; nothing half-written was left behind", str(output),
                                 "free some space, choose another disk with -o, or copy no weights (onnx --weights "
                                 "link)", code="E-FILE-DISK-FULL") from error
        if isinstance(error, PermissionError) and sys.platform == "win32":
            raise GqaExportError(f"cannot write there: {error.strerror}", str(output),
                                 "close what has files of that folder open (sessions of this process too), or choose "
                                 "another output folder with -o", code="E-FILE-WRITE") from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise GqaExportError(f"cannot write there: {error.strerror}", str(output),
                                 "choose another output folder with -o", code="E-FILE-WRITE") from error
        raise
