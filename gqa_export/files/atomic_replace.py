"""A finished folder takes the place of an older one in a single step of the file system, so that whatever stops the
process leaves either. Standard library only."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TRIES_S = (0.05, 0.1, 0.2, 0.4, 0.8)
AT_FDCWD, EXCHANGE = -100, 2  # <linux/fs.h> RENAME_EXCHANGE; macOS' RENAME_SWAP is 2 too


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C waits until this block is done: for a few file operations that must not be torn apart. It is raised again
    at the end. To block the signal in this thread would not do: the system gives it to another, and Python to this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is None:  # not set by Python, which could not set it back
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


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
    if sys.platform == "win32":  # which flushes only what may be written, and opens no folders
        if path.is_dir():
            return
        how = os.O_RDWR | os.O_BINARY
    else:
        how = os.O_RDONLY | os.O_NONBLOCK
    try:
        number = os.open(path, how)
    except (PermissionError, FileNotFoundError):
        return
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(number)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder; what is at `target` is replaced, if both are files.

    On Windows nothing can be renamed while any program has it (or something in it) open, and a virus scanner opens
    what is new: it is tried for a while.
    """
    _tried(lambda: os.replace(source, target))


def remove_file(path: Path) -> None:
    """Remove a file, which may be gone already; tried for a while like `move`."""
    _tried(lambda: path.unlink(missing_ok=True))


def _tried(step: Callable[[], None]) -> None:
    for wait in TRIES_S if sys.platform == "win32" else ():
        try:
            return step()
        except PermissionError:
            time.sleep(wait)
    step()


def replace_folder(staging: Path, output: Path) -> None:
    """`staging` becomes `output`, once all of it is on the disk. What was at `output` is then at `staging`, or gone.

    Where names cannot be exchanged (Windows, some network file systems) two renames do it: a process killed between
    them leaves the old folder beside, as `.NAME.partial-*/old`.
    """
    settle(staging)
    if not output.exists():
        move(staging, output)
        sync(output.parent)
        return
    if exchange(staging, output):
        sync(output.parent)
        return
    gc.collect()  # Windows lets nobody rename a folder with a file that something has mapped, be it garbage of ours
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent)) / "old"
    try:
        move(output, old)
        move(staging, output)
        sync(output.parent)
    except BaseException:
        if old.exists() and not output.exists():
            move(old, output)
        raise
    finally:
        if output.exists():  # else the old folder could not be put back, and is all there is
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
            move(staging / name, place)
        sync(output)
    except BaseException:
        for place, old in reversed(done):
            if old.exists():
                move(old, place)
            elif not (staging / place.name).exists():
                place.unlink(missing_ok=True)
        raise


def _keep(place: Path, old: Path) -> None:
    try:
        os.link(place, old)
    except OSError:
        move(place, old)
