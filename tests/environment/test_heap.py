"""Freed memory that stays with the process while it is wanted again and again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gqa_export.environment import heap

FAULTS = """
import resource, sys
import numpy as np
from contextlib import nullcontext
from gqa_export.environment.heap import reused_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        np.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
with reused_memory():
    faults()
    kept = faults()
print(plain, kept, faults())
"""


@pytest.mark.skipif(heap._glibc() is None, reason="the C library is not glibc")
def test_large_blocks_are_not_fetched_from_the_system_again() -> None:
    plain, kept, after = map(int, subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True,
                                                 text=True).stdout.split())
    # 80 MB each: at least 38 huge pages or 19,531 small ones; inside, the same block is taken again
    assert kept < plain / 4
    assert after > plain / 2


def test_another_c_library_is_left_alone(monkeypatch) -> None:
    class Musl:
        pass

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: Musl())
    with heap.reused_memory():
        pass
