"""The compiled kernels, every capability's own code, on the interpreter against fp64. No GPU is needed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from gqa_plugins.grouped_attention import decode, plan
from gqa_plugins.grouped_attention.cubin import Variant, compile_to_ptx
from gqa_plugins.grouped_attention.recipes import recipe

from .attention import Case, Problem, Run, attend, check, compiled, problem_of, truth, variants_of
from .cases import CAPABILITIES, RUNS, random_run
from .program import parse

pytestmark = pytest.mark.kernels
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
SMALL = Case(((100, 1), (20, 1)), 1, 150, 4, 1, 64, 64, "bf16")


def test_cases_hold_every_capability_with_every_kernel_and_dtype() -> None:
    assert len(RUNS) >= 20
    kernels = {(run.capability, kernel) for run in RUNS.values() for kernel in variants_of(run)}
    assert kernels == {(capability, kernel) for capability in CAPABILITIES
                       for kernel in ("append", "prefill", "decode", "combine")}
    assert {run.case.dtype for run in RUNS.values()} == {"bf16", "fp16", "fp32"}


@pytest.mark.parametrize("name", list(RUNS))
def test_compiled_kernels_are_as_close_to_fp64_as_eager(name: str) -> None:
    result = check(RUNS[name])
    assert result.ok, f"error {result.error:.3g}, allowed {result.allowed:.3g}"


@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("sinks", [False, True])
def test_nan_query_gives_nan_and_leaves_the_other_rows(kind: str, sinks: bool) -> None:
    run = Run(replace(SMALL, sinks=sinks, steps=2, lengths=((100, 2), (0, 1), (20, 0))), 80, kind, 3)
    problem = problem_of(run)
    problem.query[0, 0, 64:128] = torch.nan  # one head of one row
    expected = truth(problem)[0]
    output = attend(run, problem).double()
    assert expected[0, 0, 64:128].isnan().all()
    assert torch.equal(output.isnan(), expected.isnan())
    assert (output - expected).nan_to_num(0).abs().max() < 0.03


@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("place", ["past_key", "past_value", "key"])
def test_nan_and_infinity_among_the_tokens_reach_exactly_the_rows_that_see_them(kind: str, place: str) -> None:
    run = Run(replace(SMALL, steps=2, lengths=((100, 2), (20, 2)), window=30), 80, kind, 2)
    for value in (torch.nan, torch.inf):
        problem = problem_of(run)
        tensor = getattr(problem, place)
        if place == "key":
            tensor[0, 1, :] = value  # the second step's: the first does not see it
        else:
            tensor[0, 0, 71, 3] = value  # the window's first position for step 0, before it for step 1
        expected = truth(problem)[0]
        output = attend(run, problem).double()
        assert expected.isnan().any() or expected.isinf().any()
        assert torch.equal(output.isfinite(), expected.isfinite()), (place, value)


def broken_lengths(run: Run) -> tuple[Problem, torch.Tensor]:
    """Lengths that cannot be, one sequence each; what the reference gives for them."""
    problem = problem_of(run)
    problem.past_key.nan_to_num_(0.5)
    problem.past_value.nan_to_num_(0.5)
    problem.past_lengths.copy_(torch.tensor([65, -1, INT_MAX, INT_MIN, 62, 10, 5, 64]))
    problem.new_lengths.copy_(torch.tensor([1, 2, 3, 1, 3, INT_MAX, -3, INT_MIN]))
    for tensor in (problem.query, problem.key, problem.value):
        tensor.nan_to_num_(0.25)
    return problem, truth(problem)[0]


@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("capability", [80, 90])
def test_lengths_that_cannot_be_touch_no_other_memory_and_give_nan(kind: str, capability: int) -> None:
    run = Run(Case(((0, 1),) * 8, 3, 64, 4, 2, 64, 64, "bf16"), capability, kind)
    problem, expected = broken_lengths(run)
    output = attend(run, problem).double()
    assert torch.equal(output.isnan(), expected.isnan())
    assert (output - expected).nan_to_num(0).abs().max() < 0.05


@pytest.mark.parametrize("kernel", ["append", "decode", "combine", "prefill"])
def test_kernels_compile_without_new_lengths(kernel: str) -> None:
    """As PyTorch's launchers compile them where every sequence has S new tokens: the pointer is None."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = Variant(kernel, "bf16", 4, 64, 64, {"decode": 4, "prefill": 128}.get(kernel, 0))
    made_as = recipe(variant, 80)
    kinds = {name: kind.replace("T", "bf16").replace("C", "bf16") for name, kind in made_as.arguments
             if name != "new_lengths_ptr"}
    signature = {name: kinds.get(name, "constexpr") for name in made_as.kernel.arg_names}
    made = triton.compile(ASTSource(made_as.kernel, signature, {**made_as.constants, "new_lengths_ptr": None}),
                          target=GPUTarget("cuda", 80, 32), options=made_as.options)
    assert len(parse(made.asm["ptx"]).parameters) == len(made_as.arguments) - 1 + 2


def test_output_depends_on_the_share_and_not_on_the_number_of_programs() -> None:
    """Bit by bit, in the compiled code: 3 tiles each is what 3 programs get of 7, and what more get as the least."""
    case = Case(((150, 1), (0, 1), (20, 1)), 1, 160, 4, 1, 64, 64, "fp32")
    least = 3 * plan.choose_tiles(4, 64, 64, "fp32", 80).keys
    runs = [Run(case, 80, "decode", 3), *(Run(case, 80, "decode", programs, least_keys=least) for programs in (3, 5))]
    outputs = [attend(run, problem_of(run)) for run in runs]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    other = Run(case, 80, "decode", 1)
    assert not torch.equal(outputs[0], attend(other, problem_of(other))), "the share does matter"


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_fp32_stays_within_what_is_allowed_with_the_errors_of_approximate_instructions(softcap: float) -> None:
    run = Run(Case(((700, 1),), 1, 705, 4, 1, 64, 64, "fp32", softcap=softcap, sinks=softcap > 0), 80, "decode")
    exact, rough = check(run), check(run, lambda variant, capability: compiled(variant, capability, True))
    assert rough.ok
    assert rough.error != exact.error, "the made-up errors reach the output"


@pytest.mark.parametrize("number", [91, 123])
def test_the_known_fault_of_combine_at_value_head_size_8_is_mended(number: int) -> None:
    """Threads that held the same sum stored values that differed in the last bits: runs of scripts/ptx_sweep.py."""
    result = check(random_run(number))
    assert result.ok, f"error {result.error:.3g}, allowed {result.allowed:.3g}"


def sums_of_unrounded_products(ptx: str) -> list[str]:
    """Fused multiply-adds whose addend another thread sent: what came is rounded, what is added is not, and so threads
    that add up the same numbers get different sums."""
    sent: set[str] = set()
    found = []
    for one in parse(ptx).instructions:
        names = [name for operand in one.operands for name in re.findall(r"%\w+", operand)]
        if one.base == "shfl" or (one.base == "mov" and sent & set(names[1:])):
            sent.add(names[0])
        elif one.base == "fma" and names and sent & set(re.findall(r"%\w+", one.operands[-1])):
            found.append(str(one))
    return found


@pytest.mark.parametrize("capability", [80, 120])
@pytest.mark.parametrize("kernel", ["append", "prefill", "decode", "combine"])
def test_no_kernel_adds_unrounded_products_across_threads(kernel: str, capability: int) -> None:
    """The cause of the fault above, looked for in every kernel; of narrow heads most threads hold the same."""
    rows = {"decode": 4, "prefill": plan.LONG_ROWS}.get(kernel, 0)
    variant = Variant(kernel, "bf16", 4, 8, 8, rows, sinks=kernel in ("prefill", "combine"))
    assert sums_of_unrounded_products(compile_to_ptx(variant, capability)[1]) == []


def test_the_cause_is_seen_where_combine_is_compiled_with_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "COMBINE_FP_FUSION", True)
    assert sums_of_unrounded_products(compile_to_ptx(Variant("combine", "bf16", 4, 8, 8), 80)[1])
