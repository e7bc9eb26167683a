"""The interpreter sees what it is there to see: without any one barrier or wait, a kernel is found wrong.

A barrier or wait that is not missed must have had nothing to do: no access of shared memory before it since the last
barrier, no copy or product under way that it would wait for. The interpreter notes that while the kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from gqa_plugins.grouped_attention.cubin import Variant

from .attention import Case, Compiled, Run, attend, check, compiled, problem_of, variants_of
from .fault import Fault
from .machine import Machine
from .program import Instruction, number

pytestmark = pytest.mark.kernels
DECODES = {head: Run(Case(((299, 1),), 1, 300, 4, 1, head, head, "bf16"), 80, "decode", 1) for head in (64, 128)}
DECODE = DECODES[64]
PREFILL = Run(Case(((140, 33),), 33, 180, 4, 1, 64, 64, "bf16"), 90, "prefill")


def is_barrier(one: Instruction) -> bool:
    return one.opcode.startswith(("bar.sync", "barrier.sync"))


def is_wait(one: Instruction) -> bool:
    return one.opcode.startswith(("cp.async.wait_group", "wgmma.wait_group"))


def weaker(one: Instruction) -> Instruction:
    """A wait that lets one group more be under way."""
    return replace(one, operands=(str(number(one.operands[0]) + 1),))


def complaint(run: Run, kernel: str, machine: Machine) -> str:
    """What is found wrong with the run if `machine` stands for the kernel; "" for nothing."""
    def library(variant: Variant, capability: int) -> Compiled:
        cubin, original = compiled(variant, capability)
        return cubin, machine if variant.kernel == kernel else original

    try:
        result = check(run, library)
    except (Fault, AssertionError) as wrong:
        return str(wrong) or "wrong"
    return "" if result.ok else f"error {result.error}"


def machine_of(run: Run, kernel: str) -> Machine:
    return compiled(variants_of(run)[kernel], run.capability)[1].without({})


def missed(run: Run, kernel: str, which: Callable[[Instruction], bool],
           change: Callable[[Instruction], Instruction | None]) -> tuple[list[int], list[int], set[int]]:
    """(all that were changed, those whose change was not found, those that guarded something)."""
    machine = machine_of(run, kernel)
    assert complaint(run, kernel, machine) == ""
    places = [index for index, one in enumerate(machine.program.instructions) if which(one)]
    silent = [index for index in places
              if not complaint(run, kernel, machine.without({index: change(machine.program.instructions[index])}))]
    return places, silent, machine.guarding


@pytest.mark.parametrize("head", list(DECODES))
def test_every_barrier_and_wait_of_decode_that_is_removed_is_found_or_guards_nothing(head: int) -> None:
    places, silent, guarding = missed(DECODES[head], "decode", lambda one: is_barrier(one) or is_wait(one),
                                      lambda one: None)
    assert len(places) >= 10
    assert not guarding & set(silent), "a barrier or wait that guards something was removed and not missed"
    assert len(silent) <= 2


@pytest.mark.parametrize("head", list(DECODES))
def test_the_wait_in_the_loop_of_decode_that_lets_one_copy_more_be_under_way_is_found(head: int) -> None:
    """The other wait is behind the loop, whose last group holds no copy: the kernel commits one in every round."""
    places, silent, _ = missed(DECODES[head], "decode", is_wait, weaker)
    assert places
    instructions = machine_of(DECODES[head], "decode").program.instructions
    assert [instructions[index].operands for index in silent] == [("0",)]


@pytest.mark.slow
def test_waits_of_prefill_on_9_0_that_are_removed_are_found() -> None:
    """All waits for copies before the last product; of those for products, the ones that keep copies off the bytes that
    a wgmma reads. The others only order a product before its result is used, which the assembler sees to. Behind the
    last product nothing reads what copies bring, and a store that meets a copy under way is a fault by itself."""
    places, silent, guarding = missed(PREFILL, "prefill", is_wait, lambda one: None)
    instructions = compiled(variants_of(PREFILL)["prefill"], 90)[1].program.instructions
    kinds = {index: instructions[index].base for index in places}
    assert {kinds[index] for index in places} == {"cp", "wgmma"}
    last = max(index for index, one in enumerate(instructions) if one.opcode.startswith("wgmma.mma_async"))
    copies = [index for index in places if kinds[index] == "cp" and index in guarding]
    assert [index for index in copies if index < last]
    assert not [index for index in copies if index < last and index in silent]
    assert [index for index in places if kinds[index] == "wgmma" and index not in silent]


@pytest.mark.parametrize(("old", "new"), [("shl.b32", "shr.u32"), ("add.s32", "sub.s32")])
def test_wrong_addresses_are_found(old: str, new: str) -> None:
    """Of ten instructions from all over the kernel that address or mask something, one at a time; some change nothing
    at this length, or for a single sequence."""
    machine = machine_of(DECODE, "decode")
    instructions = machine.program.instructions
    places = [index for index, one in enumerate(instructions) if one.opcode == old]
    places = places[:: len(places) // 10][:10]
    found = [complaint(DECODE, "decode", machine.without({index: replace(instructions[index], opcode=new)}))
             for index in places]
    assert sum(map(bool, found)) >= 0.7 * len(places), found


def test_a_cache_that_is_one_byte_short_is_found() -> None:
    """Accesses outside an allocation: the last position's key is not there."""
    problem = problem_of(DECODE)
    problem.past_key = problem.past_key[:, :, :-1].contiguous()
    with pytest.raises(Fault, match="in no allocation"):
        attend(DECODE, problem)
