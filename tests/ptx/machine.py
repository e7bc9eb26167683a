"""Runs a kernel's PTX, a block at a time, every instruction on all threads of the block at once.

What is checked while it runs: `global_memory`, `shared_memory`, and that no thread misses a barrier. Products are
exact, added in fp64 and rounded to fp32 once per instruction: the order in which a GPU adds is not the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from . import data_steps, matrix_steps, memory_steps
from .block import Block, Step, read
from .fault import Fault
from .global_memory import GlobalMemory
from .numbers_of_ptx import TYPES, Array, as_word
from .program import Instruction, parse
from .shared_memory import SharedMemory

MOST_STEPS = 10**8
MAKERS: tuple[Callable[[Instruction, bool], Step | None], ...] = (memory_steps.make, matrix_steps.make,
                                                                  data_steps.make)
NO_EFFECT = ("bar.warp.sync", "fence.", "membar", "wgmma.fence", "griddepcontrol")


class Machine:
    """A compiled kernel, ready to be launched.

    Args:
        ptx: the compiled text.
        shared_bytes: dynamic shared memory of a launch.
        approximate: give ex2.approx and div.full the errors that the PTX manual allows them.
    """

    def __init__(self, ptx: str, shared_bytes: int, *, approximate: bool = False) -> None:
        self.program = parse(ptx)
        self.shared_bytes = shared_bytes
        self.steps = [self._step(one, approximate) for one in self.program.instructions]
        self.guarding: set[int] = set()
        """Barriers and waits that had something to order or to wait for, by index, over all launches."""

    def without(self, changes: Mapping[int, Instruction | None]) -> Machine:
        """The same kernel with instructions replaced, or left out (None)."""
        other = object.__new__(Machine)
        other.program, other.shared_bytes, other.guarding = self.program, self.shared_bytes, set()
        other.steps = list(self.steps)
        for index, instruction in changes.items():
            other.steps[index] = _nothing if instruction is None else other._step(instruction, False)
        return other

    def launch(self, grid: tuple[int, int, int], arguments: Sequence[int | float], memory: GlobalMemory) -> int:
        """Run every block; the number of instructions that ran. Hidden parameters are null. Raises Fault."""
        values = [*arguments, *(0 for _ in range(len(self.program.parameters) - len(arguments)))]
        parameters = [self._parameter(kind, value)
                      for kind, value in zip(self.program.parameters, values, strict=True)]
        memory.begin_launch()
        steps = 0
        for number, place in enumerate(np.ndindex(grid[::-1])):
            memory.begin_block(number)
            block = Block(self.program.threads, (place[2], place[1], place[0]), grid, parameters, memory,
                          SharedMemory(self.shared_bytes))
            with np.errstate(all="ignore"):  # NaN and infinity are values like others
                steps += self._run(block)
            self.guarding |= block.guarding
        return steps

    def _parameter(self, kind: str, value: int | float) -> Array:
        wanted = TYPES[kind]
        wrapped = value if kind == "f32" else int(value) & (256**np.dtype(wanted).itemsize - 1)
        return as_word(np.full(self.program.threads, wrapped, wanted))

    def _run(self, block: Block) -> int:
        steps, end = 0, len(self.steps)
        while block.next < end:
            if block.waiting:
                _meet(block)
            index = block.next
            block.next += 1
            try:
                self.steps[index](block, block.active)
            except Fault as fault:
                raise Fault(f"{self.program.name}, block {block.place}, instruction {index} "
                            f"({self.program.instructions[index]}): {fault}") from None
            steps += 1
            if steps > MOST_STEPS:
                raise Fault(f"{self.program.name} does not end")
        return steps

    def _step(self, instruction: Instruction, approximate: bool) -> Step:
        """An instruction under its guard."""
        inner = self._body(instruction, approximate)
        if not instruction.guard:
            return inner
        guard, negated = read(instruction.guard, "pred"), instruction.negated

        def guarded(block: Block, mask: Array | None) -> None:
            chosen = ~guard(block) if negated else guard(block)
            inner(block, chosen if mask is None else mask & chosen)

        return guarded

    def _body(self, instruction: Instruction, approximate: bool) -> Step:
        if instruction.base == "bra":
            target = self.program.labels[instruction.operands[0]]
            return lambda block, mask: _branch(block, mask, target)
        if instruction.base == "ret":
            return lambda block, mask: _return(block, mask, len(self.program.instructions))
        if instruction.opcode.startswith(NO_EFFECT):
            return _nothing
        for make in MAKERS:
            step = make(instruction, approximate)
            if step is not None:
                return step
        raise NotImplementedError(f"the interpreter does not know: {instruction}")


def _nothing(block: Block, mask: Array | None) -> None:
    """What orders accesses of one thread: here they are in order."""


def _branch(block: Block, mask: Array | None, target: int) -> None:
    """All go, or none; or some go ahead, and wait there for the others."""
    here = block.everyone if block.active is None else block.active
    going = here if mask is None else mask
    if not going.any():
        return
    if (going == here).all() and block.active is None:
        block.next = target
        return
    if target < block.next:
        raise Fault("threads of one block take a branch back differently")
    block.waiting.append((target, going))
    block.active = here & ~going


def _return(block: Block, mask: Array | None, end: int) -> None:
    here = block.everyone if block.active is None else block.active
    going = here if mask is None else mask
    if not (going == here).all() or block.waiting:
        raise Fault("some threads of a block return before the others")
    block.next = end


def _meet(block: Block) -> None:
    """Threads that wait for this instruction go on with the others."""
    arrived = [which for where, which in block.waiting if where == block.next]
    if not arrived:
        return
    block.waiting = [(where, which) for where, which in block.waiting if where != block.next]
    together = np.logical_or.reduce([*arrived, block.active])
    block.active = None if together.all() else together
