"""Matrix products: mma.sync (m16n8k16) and wgmma (m64nNk16), bf16 or f16 into fp32.

Source of the layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "Asynchronous Warpgroup Level Matrix
Instructions" (register fragments, shared-memory matrix layouts, matrix descriptor).
"""

from __future__ import annotations

import re

import numpy as np

from .block import Block, Read, Step, read, write
from .fault import Fault
from .memory_steps import noted
from .numbers_of_ptx import Array, widen
from .program import Instruction, number, registers

LANES = np.arange(32)
GROUP, MEMBER = LANES // 4, LANES % 4  # a fragment's row and its place in the row
WARPGROUP = 128
SWIZZLE_BYTES = {1: 128, 2: 64, 3: 32}
DEPTH = 16


def make(instruction: Instruction, _approximate: bool) -> Step | None:
    """The step of an instruction of this family, or None."""
    opcode = instruction.opcode
    if opcode.startswith("mma.sync"):
        return _mma(instruction)
    if opcode.startswith("wgmma.mma_async"):
        return _wgmma(instruction)
    if opcode.startswith("wgmma.commit_group"):
        return lambda block, mask: block.shared.commit_products()
    if opcode.startswith("wgmma.wait_group"):
        left = number(instruction.operands[0])
        return noted(lambda block: block.shared.wait_products(left), "a wait for products")
    return None


def halves(words: Array, kind: str) -> tuple[Array, Array]:
    """The two 16-bit elements of 32-bit words, as fp32."""
    return (widen((words & np.uint32(0xFFFF)).astype(np.uint16), kind),
            widen((words >> np.uint32(16)).astype(np.uint16), kind))


def _mma(instruction: Instruction) -> Step:
    kind = instruction.parts[-2]
    assert "m16n8k16" in instruction.parts, instruction
    assert kind in ("bf16", "f16"), instruction
    result = registers(instruction.operands[0])
    first, second = ([read(name, "b32") for name in registers(operand)] for operand in instruction.operands[1:3])
    added = [read(name, "f32") for name in registers(instruction.operands[3])]

    def step(block: Block, mask: Array | None) -> None:
        if mask is not None:
            raise Fault("mma that some threads do not reach")
        warps = block.threads // 32
        a, b, c = (np.zeros((warps, *shape), np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
        for i, value in enumerate(first):
            row, column = GROUP + 8 * (i % 2), MEMBER * 2 + 8 * (i // 2)
            a[:, row, column], a[:, row, column + 1] = halves(value(block).reshape(warps, 32), kind)
        for i, value in enumerate(second):
            depth = MEMBER * 2 + 8 * i
            b[:, depth, GROUP], b[:, depth + 1, GROUP] = halves(value(block).reshape(warps, 32), kind)
        for i, value in enumerate(added):
            c[:, GROUP + 8 * (i // 2), MEMBER * 2 + i % 2] = value(block).reshape(warps, 32)
        d = (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)
        for i, name in enumerate(result):
            write(block, name, d[:, GROUP + 8 * (i // 2), MEMBER * 2 + i % 2].reshape(-1), None)

    return step


def from_shared(block: Block, descriptor: int, rows: int, transposed: bool, warp: int, kind: str) -> Array:
    """A matrix [rows, 16] in fp32 through its descriptor: 8 rows of a swizzled tile lie together (or, transposed, 8
    depths), and the descriptor holds the strides between tiles in units of 16 bytes."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = descriptor >> 62 & 3
    width = SWIZZLE_BYTES[mode]
    row, depth = np.meshgrid(np.arange(rows), np.arange(DEPTH), indexing="ij")
    if transposed:
        held = width // 2
        offset = row // held * leading + row % held * 2 + depth // 8 * stride + depth % 8 * width
    else:
        offset = row // 8 * stride + row % 8 * width + depth * 2
    place = start + offset
    place = place ^ (place >> 7 & (width // 16 - 1)) << 4
    raw = block.shared.read_for_product(place.reshape(-1).astype(np.uint64), 2, warp)
    return widen(np.ascontiguousarray(raw).view(np.uint16).reshape(rows, DEPTH), kind)


def _one(values: Array) -> int:
    """A descriptor: the same in every thread of the warpgroup."""
    if (values != values[0]).any():
        raise Fault("a wgmma whose threads hold different descriptors")
    return int(values[0])


def _fragment(values: list[Read], block: Block, mine: slice, kind: str) -> Array:
    """The left factor [64, 16] from registers."""
    found = np.zeros((64, DEPTH), np.float32)
    warp, lane = np.arange(WARPGROUP) // 32, np.arange(WARPGROUP) % 32
    for i, value in enumerate(values):
        row, column = 16 * warp + lane // 4 + 8 * (i % 2), lane % 4 * 2 + 8 * (i // 2)
        found[row, column], found[row, column + 1] = halves(value(block)[mine], kind)
    return found


def _wgmma(instruction: Instruction) -> Step:
    kind, columns = instruction.kind, int(re.search(r"m64n(\d+)k16", instruction.opcode)[1])  # type: ignore[index]
    result, left = registers(instruction.operands[0]), instruction.operands[1]
    in_registers = left.startswith("{")
    factors = [read(name, "b32") for name in registers(left)] if in_registers else [read(left, "b64")]
    right, accumulate = read(instruction.operands[2], "b64"), read(instruction.operands[3], "pred")
    tail = [number(text) for text in instruction.operands[4:]]  # signs of the factors, then what is transposed
    assert tail[:2] == [1, 1], instruction
    transposed = [False, *map(bool, tail[2:])] if in_registers else list(map(bool, tail[2:]))
    before = [read(name, "f32") for name in result]
    warp, lane = np.arange(WARPGROUP) // 32, np.arange(WARPGROUP) % 32

    def step(block: Block, mask: Array | None) -> None:
        if mask is not None:
            raise Fault("wgmma that some threads do not reach")
        held = [np.array(value(block), copy=True) for value in before]
        for first in range(0, block.threads, WARPGROUP):
            mine = slice(first, first + WARPGROUP)
            b = from_shared(block, _one(right(block)[mine]), columns, transposed[1], first // 32, kind)
            if in_registers:
                a = _fragment(factors, block, mine, kind)
            else:
                a = from_shared(block, _one(factors[0](block)[mine]), 64, transposed[0], first // 32, kind)
            product = a.astype(np.float64) @ b.astype(np.float64).T
            adding = accumulate(block)[mine]
            for i, values in enumerate(held):
                row, column = 16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + lane % 4 * 2 + i % 2
                sums = product[row, column] + np.where(adding, values[mine].astype(np.float64), 0)
                values[mine] = sums.astype(np.float32)
        for name, values in zip(result, held, strict=True):
            write(block, name, values, None)

    return step
