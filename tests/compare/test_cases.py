"""Which cases are chosen, and that they reach the places where masks, windows and rotations go wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refusal import refused

from gqa_export.compare.cases import plan_cases
from gqa_export.spec import AttentionSpec, ModelSpec


def spec(*windows: int, vocabulary: int = 300) -> ModelSpec:
    layers = tuple(AttentionSpec(i, 4, 2, 8, 8, 1.0, window=w) for i, w in enumerate(windows or (0,)))
    return ModelSpec("x", "", vocabulary, 32, 512, "", layers)


def by_name(plan):
    return {case.name: case for case in plan.cases}


@settings(max_examples=40, deadline=None)
@given(capacity=st.integers(8, 600), steps=st.integers(1, 64), window=st.integers(0, 700),
       original=st.integers(0, 700), vocabulary=st.sampled_from([5, 300, 40_000]))
@example(capacity=600, steps=64, window=500, original=400, vocabulary=600_000)  # fed in pieces of 27
@example(capacity=100, steps=20, window=30, original=0, vocabulary=600_000)
def test_no_case_ever_exceeds_the_capacity(capacity, steps, window, original, vocabulary):
    plan = plan_cases(spec(window, 0, vocabulary=vocabulary), capacity, steps=steps, original_positions=original)
    for case in plan.cases:
        for row, prompt in enumerate(case.prompts):
            assert len(prompt) >= 1
            assert len(prompt) + sum(count[row] for count in case.counts) <= capacity
        # right padding is written beside the valid tokens of a growing cache, so it needs room too
        assert case.batch == 1 or max(len(p) for p in case.prompts) <= case.chunk
        assert sum(1 for c in case.counts) >= 1


def test_32_steps_are_32_steps():
    assert [len(case.counts) for case in plan_cases(spec(), 512).cases[:3]] == [32, 32, 32]


def test_the_long_prompt_passes_every_window():
    case = by_name(plan_cases(spec(16, 100), 512))["teacher_forced"]
    assert len(case.prompts[0]) > 100 + 1


def test_the_free_run_walks_across_the_smallest_window():
    case = by_name(plan_cases(spec(40, 100), 512))["free_running"]
    assert case.free
    assert len(case.prompts[0]) < 40 - 1
    assert len(case.prompts[0]) + len(case.counts) > 40 + 1


def test_the_ragged_rows_are_very_different_and_the_longest_passes_the_window():
    case = by_name(plan_cases(spec(40), 512))["ragged"]
    lengths = [len(prompt) for prompt in case.prompts]
    assert case.batch == 3
    assert max(lengths) > 40 + 1
    assert min(lengths) == 1
    assert len(set(lengths)) == 3


def test_the_ragged_rows_bring_several_tokens_at_once_and_none():
    counts = by_name(plan_cases(spec(), 512))["ragged"].counts
    assert any(max(c) > 1 and len(set(c)) == 3 for c in counts)
    assert any(0 in c for c in counts)


def test_the_prompt_passes_the_original_length_of_a_scaled_rotary():
    case = by_name(plan_cases(spec(), 512, original_positions=128))["teacher_forced"]
    assert len(case.prompts[0]) > 128


def test_a_length_that_is_too_far_is_said_not_forgotten():
    plan = plan_cases(spec(), 8192, original_positions=4096)
    assert any("4096" in note for note in plan.notes)
    assert not plan_cases(spec(), 4096, original_positions=4096).notes  # no position beyond it exists in that bundle


def test_a_ragged_window_that_is_too_far_is_said_not_forgotten():
    plan = plan_cases(spec(2048), 8192)
    assert any("ragged" in note and "2048" in note for note in plan.notes)
    assert len(by_name(plan)["teacher_forced"].prompts[0]) > 2048


def test_fewer_steps_than_asked_are_said():
    plan = plan_cases(spec(), 20, steps=32)
    assert any("10 decode steps instead of 32" in note for note in plan.notes)


def test_a_cache_of_a_few_tokens_is_refused():
    with refused("E-VALIDATE-CAPACITY"):
        plan_cases(spec(), 7)


def test_prompts_hold_no_special_tokens_and_are_the_same_every_time():
    special = set(range(0, 290))
    plan, again = (plan_cases(spec(), 512, special=special) for _ in range(2))
    for case, twin in zip(plan.cases, again.cases):
        for prompt, same in zip(case.prompts, twin.prompts):
            assert not special & set(prompt.tolist())
            assert np.array_equal(prompt, same)


def test_a_huge_vocabulary_is_fed_in_pieces():
    case = by_name(plan_cases(spec(300, vocabulary=256_000), 512))["teacher_forced"]
    assert case.chunk * 256_000 <= 1 << 24
    assert case.feeds == -(-len(case.prompts[0]) // case.chunk) + 32


def test_the_tail_is_filled_with_nan_only_where_that_is_promised():
    plans = [by_name(plan_cases(spec(), 512, nan_tail_safe=flag)) for flag in (True, False)]
    safe, unsafe = (plan["garbage_tail"].garbage for plan in plans)
    assert np.isnan(safe).any()
    assert np.isfinite(unsafe).all()
    assert max(unsafe) == 1e4


def test_every_feed_has_a_cost_and_dear_ones_cost_more():
    """What is left of a run is told by them."""
    cases = by_name(plan_cases(spec(16), 128, steps=8))
    for case in cases.values():
        assert len(case.costs) == case.feeds
    ragged = cases["ragged"]
    lengths = [len(prompt) for prompt in ragged.prompts]
    assert ragged.costs[0] > max(ragged.costs[1:])  # the prompts
    assert ragged.costs[1] > len(lengths)  # a step of every row reads the weights once for each
    # fed one by one, its tokens read the weights once for each
    alone = replace(ragged, prompts=(ragged.prompts[0],), counts=((1,), (0,)))
    assert alone.costs[1] > 1 > alone.costs[2] == 0
    assert replace(alone, single=True).costs[0] > alone.costs[0] + len(alone.prompts[0]) / 3
