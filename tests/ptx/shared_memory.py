"""A block's shared memory, with the hazards of copies and products that run beside the threads.

Warps run in any order between two barriers, so a byte remembers which warps read it and which one wrote it since the
last barrier. A cp.async owns its bytes until the wait that covers its group; a wgmma reads its operands until its own.
"""

from __future__ import annotations

import numpy as np

from .fault import Fault
from .numbers_of_ptx import Array

NONE = -1
GARBAGE = 0xFF  # NaN in every format: whoever reads too early sees it


class SharedMemory:
    """`size` bytes. Every method takes the number of each thread's warp where it matters."""

    def __init__(self, size: int) -> None:
        self.data = np.full(size, GARBAGE, np.uint8)
        self.written = np.zeros(size, np.bool_)
        self.writer = np.full(size, NONE, np.int16)
        self.readers = np.zeros(size, np.uint32)
        self.in_copy = np.zeros(size, np.bool_)
        self.in_product = np.zeros(size, np.int16)
        self._copies: list[tuple[Array, Array, Array]] = []
        self._copy_groups: list[list[tuple[Array, Array, Array]]] = []
        self._products: list[Array] = []
        self._product_groups: list[list[Array]] = []
        self._touched = False

    def load(self, addresses: Array, width: int, active: Array, warps: Array) -> Array:
        """Bytes [threads, width]; zero where a thread is not active."""
        found = np.zeros((addresses.size, width), np.uint8)
        threads = np.flatnonzero(active)
        if not threads.size:
            return found
        places, whose = self._places(addresses[threads], width, "load"), warps[threads][:, None]
        if self.in_copy[places].any():
            raise Fault("a shared load of bytes that a cp.async has not delivered")
        if not self.written[places].all():
            raise Fault("a shared load of bytes that were never written")
        writer = self.writer[places]
        if ((writer != NONE) & (writer != whose)).any():
            raise Fault("a shared load of what another warp wrote since the last barrier")
        bits = np.broadcast_to(np.uint32(1) << whose.astype(np.uint32), places.shape)
        np.bitwise_or.at(self.readers, places, bits)
        self._touched = True
        found[threads] = self.data[places]
        return found

    def store(self, addresses: Array, data: Array, active: Array, warps: Array) -> None:
        """Write data [threads, width] of the active threads."""
        threads = np.flatnonzero(active)
        if not threads.size:
            return
        places = self._places(addresses[threads], data.shape[1], "store")
        same = (self.data[places] == data[threads]) & self.written[places]
        self._check_overwrite(places, warps[threads], "store", same)
        self.data[places] = data[threads]
        if not (self.data[places] == data[threads]).all():
            raise Fault("two threads write different values to one shared byte at once")
        self.written[places] = True
        self.writer[places] = warps[threads][:, None]

    def copy(self, addresses: Array, data: Array, active: Array, warps: Array) -> None:
        """cp.async: the data arrives with the wait for its group."""
        threads = np.flatnonzero(active)
        if not threads.size:
            return
        places = self._places(addresses[threads], data.shape[1], "cp.async")
        self._check_overwrite(places, warps[threads], "cp.async", np.zeros(places.shape, np.bool_))
        self.in_copy[places] = True
        self.data[places] = GARBAGE
        self._copies.append((places, data[threads], warps[threads]))

    def commit_copies(self) -> None:
        """cp.async.commit_group."""
        self._copy_groups.append(self._copies)
        self._copies = []

    def wait_copies(self, left: int) -> bool:
        """cp.async.wait_group: deliver all groups but the last `left`. Whether anything was delivered."""
        delivered = False
        while len(self._copy_groups) > left:
            for places, data, warps in self._copy_groups.pop(0):
                self.in_copy[places] = False
                self.written[places] = True
                self.data[places] = data
                self.writer[places] = warps[:, None]
                delivered = self._touched = True
        return delivered

    def read_for_product(self, addresses: Array, width: int, warp: int) -> Array:
        """Bytes [n, width] that a wgmma reads until the wait for its group."""
        everyone, warps = np.ones(addresses.size, np.bool_), np.full(addresses.size, warp)
        found = self.load(addresses, width, everyone, warps)
        places = np.unique(self._places(addresses, width, "wgmma"))
        self.in_product[places] += 1
        self._products.append(places)
        return found

    def commit_products(self) -> None:
        """wgmma.commit_group."""
        self._product_groups.append(self._products)
        self._products = []

    def wait_products(self, left: int) -> bool:
        """wgmma.wait_group: all groups but the last `left` have read their operands. Whether any was under way."""
        done = False
        while len(self._product_groups) > left:
            for places in self._product_groups.pop(0):
                self.in_product[places] -= 1
                done = True
        return done

    def barrier(self) -> bool:
        """All accesses so far come before all that follow. Whether there were any since the last barrier."""
        guarded, self._touched = self._touched, False
        self.writer.fill(NONE)
        self.readers.fill(0)
        return guarded

    def _places(self, addresses: Array, width: int, what: str) -> Array:
        wanted = addresses.astype(np.int64)
        if (wanted % width).any() or wanted.min() < 0 or wanted.max() + width > self.data.size:
            raise Fault(f"a shared {what} of {width} bytes at {int(wanted.max())}: the block has {self.data.size}, and "
                        "accesses are aligned")
        return wanted[:, None] + np.arange(width)

    def _check_overwrite(self, places: Array, warps: Array, what: str, same: Array) -> None:
        """same: bytes that keep their value, which two warps may write without a barrier."""
        whose = warps[:, None]
        if self.in_copy[places].any():
            raise Fault(f"a shared {what} over bytes that a cp.async owns")
        if self.in_product[places].any():
            raise Fault(f"a shared {what} over bytes that a wgmma still reads")
        if (self.readers[places] & ~(np.uint32(1) << whose.astype(np.uint32))).any():
            raise Fault(f"a shared {what} over what another warp read since the last barrier")
        writer = self.writer[places]
        if ((writer != NONE) & (writer != whose) & ~same).any():
            raise Fault(f"a shared {what} over what another warp wrote since the last barrier")
        self._touched = True
