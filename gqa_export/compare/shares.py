"""Work on the rows of large arrays, in shares that threads take: numpy lets others run while it computes.

What a row gives does not depend on the share that it is in, so that results are the same on any number of cores.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..environment.machine import cores

LEAST = 1 << 19
"""elements that a share has at least: handing it to a thread costs a tenth of a millisecond, reading it one"""
T = TypeVar("T")


def in_shares(work: Callable[[slice], T], count: int, width: int, block: int = 1) -> list[T]:
    """What `work` gives for rows 0 .. count - 1, share by share, in order.

    Args:
        work: called with the rows of a share; shares run at the same time.
        count: rows. width: elements of each.
        block: a share begins at a multiple of this.
    """
    blocks = -(-count // block)
    shares = max(1, min(cores(), blocks, count * width // LEAST))
    edges = [min(count, block * (blocks * number // shares)) for number in range(shares + 1)]
    rows = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
    others = [_threads().submit(work, one) for one in rows[1:]]
    return [work(rows[0]), *(each.result() for each in others)]


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, cores() - 1), thread_name_prefix="gqa-export-shares")
