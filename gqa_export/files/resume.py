"""What a killed export leaves behind, and taking it up again.

Beside a staging folder `.NAME.partial-x` lies `.NAME.partial-x.lock`, from before the folder is made until after it is
gone, locked (filelock) by the process that fills it; the system unlocks it when that process ends, however it ends. So
an unlocked lock file means that both are abandoned. Beside a large file that is being written lies its journal: a key
over all that decides the file's bytes and, every `EVERY_BYTES`, an offset with the sha256 of everything before it. The
next export with the same key takes the file over up to the last offset whose hash still holds, and goes on from there.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK = ".lock"
JOURNAL = ".journal"
EVERY_BYTES = 64 << 20
CHUNK_BYTES = 4 << 20


Claimed = tuple[Path, "BaseFileLock"]
"""a staging folder (which may be gone) and its lock, held by this process"""


def stage(output: Path, parent: Path) -> Claimed:
    """Make an empty staging folder for `output` in `parent`, claimed for this process."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{output.name}.partial-", suffix=LOCK, dir=parent)
        os.close(handle)
        lock = claim(Path(name))
        if lock is not None:
            break  # else another process took it for abandoned before it was locked
    folder = Path(name.removesuffix(LOCK))
    folder.mkdir()
    return folder, lock


def claim(path: Path) -> BaseFileLock | None:
    """Lock a lock file until it is released. None: a living process holds it, or it may not be opened."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except (Timeout, OSError):
        return None
    return lock


def abandoned(output: Path) -> list[Claimed]:
    """Staging folders of `output` that no living process fills, each claimed for this one."""
    found: list[Claimed] = []
    for path in sorted(output.parent.glob(f".{glob.escape(output.name)}.partial-*{LOCK}")):
        lock = None if path.is_symlink() else claim(path)
        if lock is not None:
            found.append((path.with_name(path.name.removesuffix(LOCK)), lock))
    return found


def remove(claimed: Iterable[Claimed]) -> None:
    """Remove claimed folders, and then what claims them: killed in between, the rest stays claimable. So does a folder
    of which something is still open (Windows removes no open file): the next run removes it."""
    for folder, lock in claimed:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():  # a session that nobody uses any more may map a file of it
            gc.collect()
            shutil.rmtree(folder, ignore_errors=True)
        path = folder.with_name(folder.name + LOCK)
        if folder.exists():
            lock.release()
            with contextlib.suppress(OSError):
                path.touch()  # to release a lock removes its file on some systems
            continue
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
        with contextlib.suppress(OSError):  # another process has locked it by now
            path.unlink(missing_ok=True)


class Journal:
    """Notes how far a file is, for the case that this process is killed."""

    def __init__(self, path: Path, key: str) -> None:
        self._file = open(path, "w", encoding="ascii")  # noqa: SIM115 closed by close()
        self._noted = 0
        self._line({"key": key})

    def note(self, offset: int, digest: Any) -> None:
        """`offset` bytes are written, with this hashlib state; kept if enough happened since the last note."""
        if offset - self._noted >= EVERY_BYTES:
            self._line({"offset": offset, "sha256": digest.hexdigest()})
            self._noted = offset

    def _line(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Done: the journal is no longer needed."""
        self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._file.name)


def resumable(output: Path, name: str, key: str) -> bool:
    """Whether beside `output` lies a beginning of file `name` with this key. Nothing is claimed: it may be that of a
    process that lives."""
    for journal in output.parent.glob(f".{glob.escape(output.name)}.partial-*/{glob.escape(name)}{JOURNAL}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # gone by now, a line cut short
            first, *notes = journal.read_text(encoding="ascii").splitlines()
            if notes and json.loads(first)["key"] == key:
                return True
    return False


def take_over(folders: Iterable[Claimed], name: str, key: str, place: Path) -> tuple[int, Any]:
    """Move the longest sound beginning of file `name` with this key to `place`: (its bytes, its sha256 so far).

    (0, empty sha256) and no file, if there is none. The beginning is read once, to be sure of it.
    """
    best: tuple[int, Any, Path] | None = None
    for folder, _ in folders:
        size, digest = _sound(folder / name, folder / f"{name}{JOURNAL}", key)
        if size and (best is None or size > best[0]):
            best = (size, digest, folder / name)
    if best is None:
        return 0, hashlib.sha256()
    size, digest, path = best
    os.replace(path, place)
    os.truncate(place, size)
    return size, digest


def _sound(path: Path, journal: Path, key: str) -> tuple[int, Any]:
    """How many bytes of an interrupted file are as its journal says, and their sha256."""
    nothing = (0, hashlib.sha256())
    try:
        first, *notes = [json.loads(line) for line in journal.read_text(encoding="ascii").splitlines() if line]
        if first["key"] != key:
            return nothing
        known = {int(note["offset"]): note["sha256"] for note in notes}
        best, digest, done = nothing, hashlib.sha256(), 0
        with open(path, "rb") as file:
            for offset in sorted(known):
                while done < offset:
                    chunk = file.read(min(CHUNK_BYTES, offset - done))
                    if not chunk:
                        return best
                    digest.update(chunk)
                    done += len(chunk)
                if digest.hexdigest() != known[offset]:
                    return best
                best = (offset, digest.copy())
        return best
    except (OSError, ValueError, KeyError, TypeError):  # a last line cut short, a file that is not there
        return nothing
