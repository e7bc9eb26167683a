"""Huge pages for the memory that ONNX Runtime fills with a session's weights.

A decode step reads every weight once, and on pages of 4 KB the processor looks up where each of them lies. glibc does
not ask for huge pages, and where Linux gives them only on demand nobody has them. SmolLM2 with four bits, one thread,
beside the same session without: 0.8 of the time a step (`scripts/benchmark_quantize.py` measures decode with it).

What an opened session filled is made huge afterwards, while its contents stay (MADV_COLLAPSE, Linux 6.1 and later). It
is an improvement and no more: on other systems, where the administrator switched huge pages off, and on any error
memory stays as it is. `GQA_EXPORT_HUGE_PAGES=off` switches it off.

Source: man 2 madvise, man 5 proc_pid_pagemap; Linux's Documentation/admin-guide/mm/transhuge.rst.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

VARIABLE = "GQA_EXPORT_HUGE_PAGES"
HUGE = 2 << 20
PAGE = 4096
FILLED = 7 * (HUGE // PAGE) // 8
"""pages of an extent of HUGE bytes that must be there already: what is made huge is there whole"""
LEAST = 4 * HUGE
"""bytes of a model's files, below which nothing is gained: a processor remembers where so many pages lie (about two
thousand), and to look through this process's memory takes longer than to open the session"""
MOST = 2 << 30
"""bytes at most: copying them takes about a second for each gigabyte, which a larger model's steps pay back late"""
FAILURES = 8
COLLAPSE = 25
"""MADV_COLLAPSE"""
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAPS, PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
ANONYMOUS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw.p [0-9a-f]+ \S+ 0 *(?! |\[stack)", re.MULTILINE)
PRESENT = np.uint64(1 << 63)


@contextmanager
def for_what_is_filled(expected: int) -> Iterator[None]:
    """Memory of this process that is filled within the block lies on huge pages after it, up to MOST bytes.

    expected: bytes that will be filled, as far as is known; below LEAST memory stays as it is.
    """
    if expected < LEAST or not available():
        yield
        return
    before = _or_nothing()
    yield
    if before is not None and (after := _or_nothing()) is not None:
        collapse(sorted(after - before)[: MOST // HUGE])


def available() -> bool:
    """Whether this system gives huge pages to who asks for them, and nobody switched it off."""
    if sys.platform != "linux" or os.environ.get(VARIABLE) == "off" or os.sysconf("SC_PAGE_SIZE") != PAGE:
        return False
    try:
        return "[never]" not in SWITCH.read_text(encoding="ascii")
    except (OSError, ValueError):
        return False


def filled_extents() -> set[int]:
    """Addresses, multiples of HUGE, of the extents of anonymous memory that are there (nearly) whole. OSError where
    the system does not tell."""
    found: set[int] = set()
    with PAGEMAP.open("rb", buffering=0) as pages:
        for low, high in ANONYMOUS.findall(MAPS.read_text(encoding="utf-8", errors="replace")):
            start, stop = -(-int(low, 16) // HUGE) * HUGE, int(high, 16) // HUGE * HUGE
            if start >= stop:
                continue
            pages.seek(start // PAGE * 8)
            told = np.frombuffer(pages.read((stop - start) // PAGE * 8), np.uint64)
            whole = told[: len(told) // (HUGE // PAGE) * (HUGE // PAGE)].reshape(-1, HUGE // PAGE)
            there = ((whole & PRESENT) != 0).sum(axis=1)
            found.update((start + HUGE * np.flatnonzero(there >= FILLED)).tolist())
    return found


def _or_nothing() -> set[int] | None:
    try:
        return filled_extents()
    except (OSError, ValueError):
        return None


def collapse(extents: list[int]) -> int:
    """Make these extents huge pages, their contents kept; how many bytes were. Gives up where many fail: the kernel is
    too old, or has no free memory in one piece."""
    libc, made = ctypes.CDLL(None), 0
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for number, start in enumerate(extents):
        made += libc.madvise(start, HUGE, COLLAPSE) == 0
        if number - made >= FAILURES:
            break
    return made * HUGE
