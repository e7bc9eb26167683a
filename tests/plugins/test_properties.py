"""Properties for arbitrary shapes and lengths, by hypothesis, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    Case,
    assert_cache_holds_new_tokens,
    assert_close_as_eager,
    make,
    run_kernels,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.kernels
FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def cases(draw) -> Case:
    steps = draw(st.integers(1, 6))
    capacity = draw(st.integers(steps, 50))
    lengths = tuple((draw(st.integers(0, capacity - steps)), draw(st.integers(0, steps)))
                    for _ in range(draw(st.integers(1, 3))))
    head = draw(st.integers(2, 40))
    kv_heads = draw(st.integers(1, 3))
    return Case(lengths, steps, capacity=capacity, heads=kv_heads * draw(st.integers(1, 6)), kv_heads=kv_heads,
                head=head, value_head=draw(st.integers(1, 40)), dtype=draw(st.sampled_from(["fp16", "fp32"])),
                window=draw(st.integers(0, capacity + 2)), softcap=draw(st.sampled_from([0.0, 2.0, 30.0])),
                sinks=draw(st.booleans()), rotary=2 * draw(st.integers(0, head // 2)), interleaved=draw(st.booleans()),
                seed=draw(st.integers(0, 10**6)))


@given(cases(), st.sampled_from(["prefill", "decode"]), st.integers(1, 5))
@FEW
def test_any_case_is_as_close_to_fp64_as_twice_eager(case: Case, kind: str, programs: int) -> None:
    problem = make(case)
    before_key, before_value = problem.past_key.clone(), problem.past_value.clone()
    output = run_kernels(problem, kind, programs=programs)
    assert_cache_holds_new_tokens(problem, before_key, before_value)
    problem.past_key.copy_(before_key)
    problem.past_value.copy_(before_value)
    assert_close_as_eager(output, problem)


@given(cases(), st.sampled_from(["prefill", "decode"]))
@FEW
def test_outputs_lie_within_the_values_that_are_seen(case: Case, kind: str) -> None:
    """Weights are at least 0 and sum to at most 1 (a sink takes the rest): no output exceeds the largest value."""
    problem = make(case)
    output = run_kernels(problem, kind)
    for b, (past, new) in enumerate(case.lengths):
        seen = problem.past_value[b, :, :past + new].abs().float()
        most = seen.amax().item() if seen.numel() else 0.0
        assert output[b].abs().max().item() <= most * (1 + 2**-9)


@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 5))
@FEW
def test_prompt_in_two_chunks_equals_the_prompt_at_once(past: int, first: int, second: int) -> None:
    case = Case(((past, first + second),), first + second, capacity=64, dtype="fp32", window=9)
    whole = make(case)
    keys, values = whole.past_key.clone(), whole.past_value.clone()
    at_once = run_kernels(whole, "prefill")
    pieces = []
    for start, count in ((0, first), (first, second)):
        piece = make(Case(((past + start, count),), count, capacity=64, dtype="fp32", window=9))
        for name in ("query", "key", "value"):
            getattr(piece, name).copy_(getattr(whole, name)[:, start: start + count])
        piece.past_key.copy_(keys)
        piece.past_value.copy_(values)
        pieces.append(run_kernels(piece, "prefill"))
        keys, values = piece.past_key, piece.past_value
    assert torch.equal(keys[:, :, :past + first + second], whole.past_key[:, :, :past + first + second])
    # The same terms in another order: at most 9 of them, of size up to about 4, in fp32.
    assert (torch.cat(pieces, dim=1) - at_once).abs().max() <= 9 * 4 * 2**-23
