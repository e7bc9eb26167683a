"""Weights of an opened session lie on huge pages, where the system gives them and nobody switched it off."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from gqa_export.runtime.ort import huge_pages

EXTENTS = 4
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="madvise with MADV_COLLAPSE is Linux's")


def memory() -> tuple[mmap.mmap, np.ndarray]:
    """Anonymous memory that nothing has touched, of so many extents wherever it begins."""
    held = mmap.mmap(-1, (EXTENTS + 1) * huge_pages.HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return held, np.frombuffer(held, np.uint8)


def huge_bytes(array: np.ndarray) -> int:
    """Bytes of huge pages in the mapping that an array lies in."""
    address, inside = array.ctypes.data, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and ":" not in first:
            low, high = (int(each, 16) for each in first.split("-"))
            inside = low <= address < high
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("the mapping is not listed")


@on_linux
def test_what_is_filled_becomes_huge_and_keeps_its_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    if not huge_pages.available():
        pytest.skip("huge pages are switched off on this machine")
    random = np.random.default_rng(3)
    _held, array = memory()
    wanted = random.integers(0, 256, len(array), np.uint8)
    with huge_pages.for_what_is_filled(huge_pages.LEAST):
        array[:] = wanted
    if not huge_bytes(array):
        pytest.skip("this kernel does not collapse pages, or has no free memory in one piece")
    assert huge_bytes(array) >= EXTENTS // 2 * huge_pages.HUGE
    assert np.array_equal(array, wanted)


@on_linux
def test_what_was_there_before_and_what_is_half_filled_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    monkeypatch.setattr(huge_pages, "available", lambda: True)
    monkeypatch.setattr(huge_pages, "collapse", lambda extents: told.extend(extents) or 0)
    (_first, before), (_second, sparse), (_third, whole) = memory(), memory(), memory()
    before[:] = 1
    with huge_pages.for_what_is_filled(huge_pages.LEAST):
        sparse[:: 2 * huge_pages.PAGE] = 1
        whole[:] = 1

    def inside(array: np.ndarray) -> list[int]:
        start = array.ctypes.data
        return [each for each in told if start <= each < start + len(array)]

    assert inside(before) == []
    assert inside(sparse) == []
    assert EXTENTS <= len(inside(whole)) <= EXTENTS + 1


@on_linux
def test_no_more_than_the_limit_is_made_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(huge_pages, "available", lambda: True)
    monkeypatch.setattr(huge_pages, "MOST", 2 * huge_pages.HUGE)
    monkeypatch.setattr(huge_pages, "collapse", lambda extents: told.extend(extents) or 0)
    _held, array = memory()
    with huge_pages.for_what_is_filled(huge_pages.LEAST):
        array[:] = 1
    assert len(told) == 2


def test_the_variable_the_administrator_and_other_systems_switch_it_off(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(huge_pages, "PAGE", huge_pages.os.sysconf("SC_PAGE_SIZE"))
    switch = tmp_path / "enabled"
    monkeypatch.setattr(huge_pages, "SWITCH", switch)
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    assert not huge_pages.available()  # a system that does not tell
    switch.write_text("always [madvise] never\n")
    assert huge_pages.available()
    monkeypatch.setenv(huge_pages.VARIABLE, "off")
    assert not huge_pages.available()
    monkeypatch.delenv(huge_pages.VARIABLE)
    switch.write_text("always madvise [never]\n")
    assert not huge_pages.available()
    switch.write_text("[always] madvise never\n")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not huge_pages.available()


def test_a_system_that_does_not_tell_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huge_pages, "available", lambda: True)
    monkeypatch.setattr(huge_pages, "PAGEMAP", tmp_path / "missing")
    monkeypatch.setattr(huge_pages, "collapse", lambda extents: pytest.fail("nothing is known of the memory"))
    with huge_pages.for_what_is_filled(huge_pages.LEAST):
        pass


def test_memory_is_not_looked_through_for_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "available", lambda: True)
    monkeypatch.setattr(huge_pages, "filled_extents", lambda: pytest.fail("it takes longer than to open the session"))
    with huge_pages.for_what_is_filled(huge_pages.LEAST - 1):
        pass


@on_linux
def test_it_gives_up_where_nothing_can_be_made_huge() -> None:
    nowhere = [number * huge_pages.HUGE for number in range(1, 1000)]
    assert huge_pages.collapse(nowhere) == 0


def test_only_memory_that_a_program_allocates_is_looked_at() -> None:
    lines = ("55d0a0000000-55d0a2000000 rw-p 00000000 00:00 0                          [heap]\n"
             "7f1000000000-7f1002000000 rw-p 00000000 00:00 0 \n"
             "7f2000000000-7f2002000000 r--p 00000000 00:00 0 \n"
             "7f3000000000-7f3002000000 rw-p 00000000 08:01 42                         /a/library\n"
             "7ffc00000000-7ffc02000000 rw-p 00000000 00:00 0                          [stack]\n")
    assert [low for low, _ in huge_pages.ANONYMOUS.findall(lines)] == ["55d0a0000000", "7f1000000000"]
