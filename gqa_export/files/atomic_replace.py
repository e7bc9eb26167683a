"""A finished folder takes the place of an older one in a single step of the file system, so that whatever stops the
process leaves either. Standard library only."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AT_FDCWD, EXCHANGE = -100, 2  # <linux/fs.h> RENAME_EXCHANGE; macOS' RENAME_SWAP is 2 too


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C waits until this block is done: for a few file operations that must not be torn apart."""
    here = hasattr(signal, "pthread_sigmask") and threading.current_thread() is threading.main_thread()
    if not here:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders at once. False, and nothing done, where the system cannot."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(one), os.fsencode(other)
        if sys.platform == "darwin":
            return library.renamex_np(names[0], names[1], EXCHANGE) == 0
        return library.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], EXCHANGE) == 0
    except (OSError, AttributeError, TypeError):  # Windows, an old C library
        return False


def settle(folder: Path) -> None:
    """Wait until the files of a folder and their names are on the disk: a name that vouches for them may follow.

    Files that this process may not open are not its own; some file systems cannot tell, and are believed.
    """
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def sync(path: Path) -> None:
    """See `settle`, of one file or folder."""
    if os.name == "nt":  # which flushes neither folders nor what was opened for reading
        return
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (PermissionError, FileNotFoundError):
        return
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(number)


def replace_folder(staging: Path, output: Path) -> None:
    """`staging` becomes `output`, once all of it is on the disk. What was at `output` is then at `staging`, or gone.

    Where names cannot be exchanged (some network file systems) two renames do it: a process killed between them
    leaves the old folder beside, as `.NAME.partial-*/old`.
    """
    settle(staging)
    if not output.exists():
        staging.rename(output)
        sync(output.parent)
        return
    if exchange(staging, output):
        sync(output.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent)) / "old"
    try:
        output.rename(old)
        staging.rename(output)
        sync(output.parent)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def move_files(names: list[str], staging: Path, output: Path) -> None:
    """Move files of `staging` into `output` in this order; if that is interrupted, all that were there are back.

    A killed process cannot put anything back: the last name is to be the one that vouches for the others, and is moved
    when these are on the disk. Files that are replaced are kept by a second name until the end, or, where the file
    system has no hard links (exFAT, SMB), by another name: each is then missing for a moment.
    """
    done: list[tuple[Path, Path]] = []
    settle(staging)
    try:
        for name in names:
            place, old = output / name, staging / f".old-{name}"
            done.append((place, old))
            if place.exists():
                _keep(place, old)
            if name == names[-1]:
                sync(output)
            os.replace(staging / name, place)
        sync(output)
    except BaseException:
        for place, old in reversed(done):
            if old.exists():
                os.replace(old, place)
            elif not (staging / place.name).exists():
                place.unlink(missing_ok=True)
        raise


def _keep(place: Path, old: Path) -> None:
    try:
        os.link(place, old)
    except OSError:
        place.rename(old)
