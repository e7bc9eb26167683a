"""Loads, stores, copies, barriers and waits, and what moves data between the threads of a warp."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .block import Block, Step, address, read, write
from .fault import Fault
from .numbers_of_ptx import WORDS, Array
from .program import Instruction, number, registers

ROW_BYTES = 16  # of an 8 x 8 matrix of 16-bit elements
LANES = np.arange(32)


def make(instruction: Instruction, _approximate: bool) -> Step | None:
    """The step of an instruction of this family, or None."""
    opcode = instruction.opcode
    for prefix, maker in (("ld.param", _parameter), ("ld.", _load), ("st.", _store), ("ldmatrix", _load_matrix),
                          ("stmatrix", _store_matrix), ("shfl", _shuffle),
                          ("redux.sync", _reduction_of_warp), ("cp.async.commit_group", _commit),
                          ("cp.async.wait_group", _wait), ("cp.async.c", _copy), ("bar.sync", _barrier),
                          ("barrier.sync", _barrier)):
        if opcode.startswith(prefix):
            return maker(instruction)
    return None


def _parameter(instruction: Instruction) -> Step:
    place = int(instruction.operands[1].rstrip("]").rpartition("_")[2])
    return lambda block, mask: write(block, instruction.operands[0], block.parameters[place], mask)


def _vector(instruction: Instruction) -> tuple[bool, int, int]:
    """(global, bytes of one element, elements)."""
    count = next((int(part[1:]) for part in instruction.parts if re.fullmatch(r"v\d", part)), 1)
    return "global" in instruction.parts, int(instruction.kind[1:]) // 8, count


def _load(instruction: Instruction) -> Step:
    is_global, width, count = _vector(instruction)
    names, where = registers(instruction.operands[0]), address(instruction.operands[1])
    kind = np.int8 if instruction.kind == "s8" else WORDS[width]  # whose sign fills the register

    def step(block: Block, mask: Array | None) -> None:
        memory = block.memory if is_global else block.shared
        raw = memory.load(where(block), width * count, block.everyone if mask is None else mask, block.warps)
        columns = np.ascontiguousarray(raw).view(kind)
        for i, name in enumerate(names):
            write(block, name, columns[:, i].copy(), mask)

    return step


def _store(instruction: Instruction) -> Step:
    is_global, width, count = _vector(instruction)
    where = address(instruction.operands[0])
    values = [read(name, f"b{8 * width}") for name in registers(instruction.operands[1])]
    assert len(values) == count

    def step(block: Block, mask: Array | None) -> None:
        memory = block.memory if is_global else block.shared
        data = np.stack([value(block) for value in values], 1)
        memory.store(where(block), data.view(np.uint8), block.everyone if mask is None else mask, block.warps)

    return step


def _copy(instruction: Instruction) -> Step:
    target, source, size = instruction.operands[0], address(instruction.operands[1]), number(instruction.operands[2])
    into = address(target)
    live = read(instruction.operands[3], "b32") if len(instruction.operands) > 3 else None

    def step(block: Block, mask: Array | None) -> None:
        active = block.everyone if mask is None else mask
        wanted = np.full(block.threads, size) if live is None else live(block)
        data = block.memory.load(source(block), size, active & (wanted > 0), block.warps)
        data[np.arange(size) >= wanted[:, None]] = 0
        block.shared.copy(into(block), data, active, block.warps)

    return step


def _everyone(block: Block, mask: Array | None, what: str) -> None:
    if mask is not None and not mask.all():
        raise Fault(f"{what} that some threads do not reach")


def noted(order: Callable[[Block], bool], what: str) -> Step:
    """A barrier or wait; the block notes whether it had anything to do."""
    def step(block: Block, mask: Array | None) -> None:
        _everyone(block, mask, what)
        if order(block):
            block.guarding.add(block.next - 1)

    return step


def _barrier(_instruction: Instruction) -> Step:
    def order(block: Block) -> bool:
        block.memory.barriers += 1
        return block.shared.barrier()

    return noted(order, "a barrier")


def _wait(instruction: Instruction) -> Step:
    left = number(instruction.operands[0])
    return noted(lambda block: block.shared.wait_copies(left), "a wait for copies")


def _commit(_instruction: Instruction) -> Step:
    def step(block: Block, mask: Array | None) -> None:
        _everyone(block, mask, "a commit of copies")
        block.shared.commit_copies()

    return step


def _shuffle(instruction: Instruction) -> Step:
    mode = instruction.parts[2]
    name = instruction.operands[0].partition("|")[0]
    values, places = read(instruction.operands[1], "b32"), read(instruction.operands[2], "b32")

    def step(block: Block, mask: Array | None) -> None:
        other = places(block).reshape(-1, 32).astype(np.int64)
        below = np.where(other <= LANES, LANES - other, LANES)  # where nothing is that far below: the lane's own
        source = {"bfly": LANES ^ other, "idx": np.broadcast_to(other, other.shape), "up": below}[mode] & 31
        found = np.take_along_axis(values(block).reshape(-1, 32), source, 1)
        write(block, name, found.reshape(-1), mask)

    return step


def _reduction_of_warp(instruction: Instruction) -> Step:
    values = read(instruction.operands[1], "s32")
    reduce = {"add": np.sum, "min": np.min, "max": np.max}[instruction.parts[2]]

    def step(block: Block, mask: Array | None) -> None:
        _everyone(block, mask, "a reduction over a warp")
        reduced = reduce(values(block).reshape(-1, 32).astype(np.int64), axis=1).astype(np.int32)
        write(block, instruction.operands[0], np.repeat(reduced, 32), None)

    return step


def _matrices(instruction: Instruction) -> tuple[int, bool]:
    """(how many 8 x 8 matrices, transposed)."""
    count = next(int(part[1:]) for part in instruction.parts if re.fullmatch(r"x\d", part))
    return count, "trans" in instruction.parts


def _rows(block: Block, addresses: Array, count: int) -> tuple[Array, Array]:
    """(address, warp) of every row: lane 8 m + r of a warp points to row r of matrix m."""
    return (addresses.reshape(-1, 32)[:, :8 * count].reshape(-1),
            block.warps.reshape(-1, 32)[:, :8 * count].reshape(-1))


def _load_matrix(instruction: Instruction) -> Step:
    count, transposed = _matrices(instruction)
    names, where = registers(instruction.operands[0]), address(instruction.operands[1])

    def step(block: Block, mask: Array | None) -> None:
        _everyone(block, mask, "ldmatrix")
        rows, warps = _rows(block, where(block), count)
        raw = block.shared.load(rows, ROW_BYTES, np.ones(rows.size, np.bool_), warps)
        elements = np.ascontiguousarray(raw).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            elements = elements.transpose(0, 1, 3, 2)
        for m, name in enumerate(names):
            low, high = (elements[:, m, LANES // 4, LANES % 4 * 2 + i].astype(np.uint32) for i in (0, 1))
            write(block, name, (low | high << np.uint32(16)).reshape(-1), None)

    return step


def _store_matrix(instruction: Instruction) -> Step:
    count, transposed = _matrices(instruction)
    where = address(instruction.operands[0])
    values = [read(name, "b32") for name in registers(instruction.operands[1])]

    def step(block: Block, mask: Array | None) -> None:
        _everyone(block, mask, "stmatrix")
        elements = np.zeros((block.threads // 32, count, 8, 8), np.uint16)
        for m, value in enumerate(values):
            words = value(block).reshape(-1, 32)
            for i in (0, 1):
                elements[:, m, LANES // 4, LANES % 4 * 2 + i] = (words >> np.uint32(16 * i)).astype(np.uint16)
        if transposed:
            elements = elements.transpose(0, 1, 3, 2)
        rows, warps = _rows(block, where(block), count)
        data = np.ascontiguousarray(elements).reshape(-1, 8).view(np.uint8)
        block.shared.store(rows, data, np.ones(rows.size, np.bool_), warps)

    return step
