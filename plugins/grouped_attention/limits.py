"""What a launch can hold, for every way to the kernels: PyTorch, both plugins. Standard library only.

The C++ plugin has the same numbers (plugins/cpp/gqa/attention/layer.h); a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_HEAD = 256
MAX_GRID_YZ = 65535  # CUDA's limit on the second and third grid dimension: heads and sequences lie there
MAX_HEAD_ELEMENTS = 2**31 - 2**16  # within one head of one sequence the kernels count elements in 32 bits


@dataclass(frozen=True)
class Excess:
    """What is too large. argument: the tensor whose shape shows it, by the contract's name."""

    argument: str
    message: str
    fix: str


def find_excess(batch: int, kv_heads: int, capacity: int, head: int, value_head: int) -> Excess | None:
    """The first size that no kernel takes, or None."""
    for name, size in (("past_key", head), ("past_value", value_head)):
        if not 1 <= size <= MAX_HEAD:
            return Excess(name, f"head size {size} is outside 1 .. {MAX_HEAD}", 'use backend="reference"')
        if capacity * size > MAX_HEAD_ELEMENTS:
            return Excess(name, f"capacity {capacity} times head size {size} exceeds {MAX_HEAD_ELEMENTS} elements",
                          f"use a capacity of at most {MAX_HEAD_ELEMENTS // size}")
    if batch > MAX_GRID_YZ or kv_heads > MAX_GRID_YZ:
        name = "query" if batch > MAX_GRID_YZ else "kv_num_heads"
        return Excess(name, f"B = {batch}, K = {kv_heads}: CUDA grids end at {MAX_GRID_YZ}", "split the batch")
    return None
