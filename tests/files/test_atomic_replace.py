"""Files that take the place of others: on file systems without hard links, and before the power fails."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from gqa_export.files import atomic_replace
from gqa_export.files.atomic_replace import move_files, remove_file, replace_folder, undisturbed
from gqa_export.files.write_text import write_text

NAMES = ["a", "b", "manifest"]


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """(staging with new files, output with old ones and one that is not replaced)."""
    staging, output = tmp_path / "output" / ".staging", tmp_path / "output"
    staging.mkdir(parents=True)
    for name in NAMES:
        (staging / name).write_text(f"new {name}")
    for name in ("a", "manifest", "config.json"):
        (output / name).write_text(f"old {name}")
    return staging, output


@pytest.fixture
def no_links(monkeypatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


def texts(output: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in output.iterdir() if path.is_file()}


@pytest.mark.usefixtures("no_links")
def test_files_are_replaced_where_there_are_no_hard_links(folders) -> None:
    staging, output = folders
    move_files(NAMES, staging, output)
    assert texts(output) == {"config.json": "old config.json", **{name: f"new {name}" for name in NAMES}}


@pytest.mark.usefixtures("no_links")
@pytest.mark.parametrize("moves", range(3))
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError], ids=["interrupt", "error"])
def test_interrupted_without_hard_links_all_old_files_are_back(folders, monkeypatch, moves, error) -> None:
    staging, output = folders
    before, real, count = texts(output), os.replace, [0]

    def replace(source: Path, place: Path) -> None:
        count[0] += 1
        if count[0] == moves + 1:
            raise error
        real(source, place)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(error):
        move_files(NAMES, staging, output)
    assert texts(output) == before


@pytest.fixture
def events(monkeypatch) -> list[tuple[str, str]]:
    """What happens to which name, in order."""
    seen: list[tuple[str, str]] = []
    sync, replace, rename, exchange = os.fsync, os.replace, Path.rename, atomic_replace.exchange

    def synced(number: int) -> None:
        seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{number}")).name))
        sync(number)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda source, place: (seen.append(("move", Path(place).name)),
                                                              replace(source, place)))
    monkeypatch.setattr(Path, "rename", lambda source, place: (seen.append(("move", Path(place).name)),
                                                               rename(source, place))[1])
    monkeypatch.setattr(atomic_replace, "exchange", lambda one, other: (seen.append(("move", other.name)),
                                                                        exchange(one, other))[1])
    return seen


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files are read from /proc")


@needs_proc
def test_the_manifest_is_moved_when_what_it_vouches_for_is_on_the_disk(folders, events) -> None:
    move_files(NAMES, *folders)
    vouches = events.index(("move", "manifest"))
    assert {("sync", name) for name in NAMES} <= set(events[: events.index(("move", "a"))])
    assert ("sync", "output") in events[events.index(("move", "b")) : vouches], "the names of the others"
    assert ("sync", "output") in events[vouches:]


@needs_proc
@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_a_folder_gets_its_name_when_its_files_are_on_the_disk(tmp_path, events, there) -> None:
    staging, output = tmp_path / "staging", tmp_path / "output"
    (staging / "deep").mkdir(parents=True)
    (staging / "deep" / "file").write_text("new")
    if there:
        output.mkdir()
    replace_folder(staging, output)
    moved = events.index(("move", "output"))
    assert {("sync", "file"), ("sync", "deep"), ("sync", "staging")} <= set(events[:moved])
    assert ("sync", tmp_path.name) in events[moved:]
    assert (output / "deep" / "file").read_text() == "new"


@needs_proc
def test_a_text_is_on_the_disk_before_it_replaces_another(tmp_path, events) -> None:
    write_text(tmp_path / "report", "text")
    assert [what for what, _ in events] == ["sync", "move"]


def test_a_disk_that_turns_out_full_when_it_is_written_to_leaves_the_old_files(folders, monkeypatch) -> None:
    staging, output = folders
    before = texts(output)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        move_files(NAMES, staging, output)
    assert texts(output) == before


@pytest.mark.skipif(sys.platform == "win32", reason="there one process cannot send itself Ctrl-C alone")
def test_an_interrupt_waits_for_the_end_of_a_block_though_other_threads_run() -> None:
    """The system gives the signal to any thread that does not block it; torch, rich and our own have such."""
    ended, done = threading.Event(), []
    other = threading.Thread(target=ended.wait, daemon=True)
    other.start()

    def work() -> None:
        with undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            for step in range(20):
                time.sleep(0.005)
                done.append(step)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        ended.set()
    assert done == list(range(20))


def test_a_file_is_removed_though_a_virus_scanner_has_it_open_for_a_while(tmp_path, monkeypatch) -> None:
    place, tries, real = tmp_path / "data", [], Path.unlink

    def held(self: Path, missing_ok: bool = False) -> None:
        tries.append(self)
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, "in use")
        real(self, missing_ok=missing_ok)

    place.write_text("content")
    monkeypatch.setattr(Path, "unlink", held)
    monkeypatch.setattr(sys, "platform", "win32")
    remove_file(place)
    assert not place.exists()
