"""One block that runs: its registers, a vector over the threads each, and how operands are read and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .global_memory import GlobalMemory
from .numbers_of_ptx import TYPES, WORDS, Array, as_word
from .program import number
from .shared_memory import SharedMemory

UNDEFINED = 0xCDCD_CDCD_CDCD_CDCD  # what the compiler left undefined: a value that shows if it is ever used
AXES = "xyz"


@dataclass
class Block:
    """active: the threads that run, None for all; waiting: (where, which) threads that took a branch ahead."""

    threads: int
    place: tuple[int, int, int]
    grid: tuple[int, int, int]
    parameters: list[Array]
    memory: GlobalMemory
    shared: SharedMemory
    registers: dict[str, Array] = field(default_factory=dict)
    next: int = 0
    active: Array | None = None
    waiting: list[tuple[int, Array]] = field(default_factory=list)
    guarding: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.numbers = np.arange(self.threads, dtype=np.uint32)
        self.warps = (self.numbers // 32).astype(np.int64)
        self.everyone = np.ones(self.threads, np.bool_)


Step = Callable[[Block, "Array | None"], None]
Read = Callable[[Block], Array]


def read(token: str, kind: str) -> Read:
    """What gives an operand's values as a numpy type."""
    wanted = np.dtype(TYPES[kind])
    if token == "%tid.x":
        return lambda block: block.numbers.astype(wanted)
    for special, of in (("%ctaid.", "place"), ("%nctaid.", "grid")):
        if token.startswith(special):
            axis = AXES.index(token[-1])
            return lambda block: np.full(block.threads, getattr(block, of)[axis], wanted)
    if token.startswith("%"):
        return lambda block: _as(block.registers.get(token), wanted, block.threads)
    return _constant(token, wanted)


def _as(held: Array | None, wanted: np.dtype, threads: int) -> Array:
    if held is None:
        held = np.full(threads, UNDEFINED, np.uint64)
    if held.dtype == wanted:
        return held
    if held.dtype.itemsize == wanted.itemsize and held.dtype != np.bool_:
        return held.view(wanted)
    return held.astype(WORDS[wanted.itemsize]).view(wanted)


def _constant(token: str, wanted: np.dtype) -> Read:
    if token == "global_smem":
        value = np.zeros(1, wanted)
    elif token.startswith("0f"):
        value = np.array([int(token[2:], 16)], np.uint32).view(wanted)
    elif wanted == np.bool_:
        value = np.array([number(token) != 0])
    else:
        word = WORDS[wanted.itemsize]
        value = np.array([number(token) & (256**wanted.itemsize - 1)], word).view(wanted)
    return lambda block: np.broadcast_to(value, block.threads)


def address(token: str) -> Read:
    """What gives the addresses of `[register + offset]`, uint64."""
    base, _, offset_text = token[1:-1].replace(" ", "").partition("+")
    offset = number(offset_text) if offset_text else 0
    if base == "global_smem":
        return lambda block: np.full(block.threads, offset, np.uint64)
    held = read(base, "b64")
    narrow = read(base, "b32")

    def add(block: Block) -> Array:
        wide = block.registers[base].dtype.itemsize == 8
        found = held(block) if wide else narrow(block).astype(np.uint64)
        return (found.astype(np.int64) + offset).astype(np.uint64)

    return add


def write(block: Block, name: str, values: Array, mask: Array | None) -> None:
    """Put values into a register of the threads in `mask`; as it was in the others."""
    if name == "_":
        return
    word = as_word(values)
    if mask is not None:
        before = block.registers.get(name)
        if before is None:
            before = np.full(block.threads, UNDEFINED & (256**word.dtype.itemsize - 1), word.dtype)
        word = np.where(mask, word, before.astype(word.dtype, copy=False))
    block.registers[name] = word
