"""Device memory: numpy arrays at made-up addresses. Every access is checked.

A byte remembers who wrote it in the running launch. A launch may not have two blocks that write one byte, nor one that
reads what another wrote: blocks run in any order. Within a block, another warp may read it after a barrier only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .fault import Fault
from .numbers_of_ptx import Array

FIRST_ADDRESS = 0x7F00_0000_0000
GAP = 65536  # between allocations: an access that passes the end of one is in none
ALIGNMENT = 256
NOT_WRITTEN = -1


@dataclass
class Allocation:
    """One tensor. writers: block, number of barriers passed and warp of the last write in this launch, a byte each."""

    name: str
    address: int
    data: Array
    readonly: bool
    writers: Array

    @property
    def end(self) -> int:
        """The address after the last byte."""
        return self.address + self.data.size


class GlobalMemory:
    """All tensors of one call."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self._next = FIRST_ADDRESS
        self.block = 0
        self.barriers = 0

    def reserve(self, size: int) -> int:
        """An aligned address with `size` bytes after it and a gap on both sides."""
        address = self._next
        self._next += (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT + GAP
        return address

    def add(self, name: str, data: Array, *, readonly: bool = False, address: int | None = None) -> int:
        """Put bytes (uint8, contiguous; not copied) at an address: a new one, or one that was reserved."""
        place = self.reserve(data.size) if address is None else address
        self.allocations.append(Allocation(name, place, data, readonly, np.full(data.size, NOT_WRITTEN, np.int64)))
        return place

    def begin_launch(self) -> None:
        """Launches of one stream run one after another: what was written before may be read."""
        for allocation in self.allocations:
            allocation.writers.fill(NOT_WRITTEN)

    def begin_block(self, number: int) -> None:
        """Whose accesses follow."""
        self.block, self.barriers = number, 0

    def load(self, addresses: Array, width: int, active: Array, warps: Array) -> Array:
        """Bytes [threads, width]; zero where a thread is not active."""
        found = np.zeros((addresses.size, width), np.uint8)
        for threads, allocation, places in self._find(addresses, width, active, "load"):
            self._check_order(allocation, places, warps[threads], "reads")
            found[threads] = allocation.data[places]
        return found

    def store(self, addresses: Array, data: Array, active: Array, warps: Array) -> None:
        """Write data [threads, width] of the active threads."""
        for threads, allocation, places in self._find(addresses, data.shape[1], active, "store"):
            if allocation.readonly:
                raise Fault(f"a store into {allocation.name}, which is only read")
            same = (allocation.data[places] == data[threads]).all(axis=1)
            self._check_order(allocation, places[~same], warps[threads][~same], "writes")
            self._check_order(allocation, places[same], None, "writes")
            allocation.data[places] = data[threads]
            if not (allocation.data[places] == data[threads]).all():
                raise Fault(f"two threads write different values to one byte of {allocation.name} at once")
            allocation.writers[places] = (self.block << 32 | self.barriers << 8) + warps[threads][:, None]

    def _check_order(self, allocation: Allocation, places: Array, warps: Array | None, does: str) -> None:
        """warps: None where the same value is written again, which is harmless within a block."""
        writers = allocation.writers[places]
        written = writers != NOT_WRITTEN
        if (written & (writers >> 32 != self.block)).any():
            raise Fault(f"a block {does} bytes of {allocation.name} that another block wrote in this launch")
        if warps is None:
            return
        unordered = (writers >> 8 & 0xFFFFFF) == self.barriers
        if (written & unordered & ((writers & 0xFF) != warps[:, None])).any():
            raise Fault(f"a warp {does} bytes of {allocation.name} that another warp wrote since the last barrier")

    def _find(self, addresses: Array, width: int, active: Array,
              what: str) -> Iterator[tuple[Array, Allocation, Array]]:
        """(threads, allocation, indices of their bytes [threads, width]) for every allocation that is accessed."""
        threads = np.flatnonzero(active)
        wanted = addresses[threads].astype(np.int64)
        if (wanted % width).any():
            raise Fault(f"a global {what} of {width} bytes at {int(wanted[wanted % width != 0][0]):#x}, not aligned")
        left = np.ones(threads.size, np.bool_)
        for allocation in self.allocations:
            offsets = wanted - allocation.address
            here = left & (offsets >= 0) & (offsets + width <= allocation.data.size)
            if here.any():
                left &= ~here
                yield threads[here], allocation, offsets[here][:, None] + np.arange(width)
        if left.any():
            raise Fault(f"a global {what} of {width} bytes {self._place(int(wanted[left][0]))}")

    def _place(self, address: int) -> str:
        before = [one for one in self.allocations if one.address <= address]
        if not before:
            return f"at {address:#x}, before every allocation"
        last = max(before, key=lambda one: one.address)
        return f"{address - last.end:+d} bytes from the end of {last.name}, in no allocation"
