"""The suite: its cases by name, what they reach, and the decoders that only they can tell from a good one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import refused

from gqa_export.compare.logits import LogitTally, log_softmax
from gqa_export.compare.setting import LEAST_PIECE, SCORE_ELEMENTS, Setting
from gqa_export.compare.suite import DRIFT_STEPS, LEVELS, SUITE, plan_suite
from gqa_export.runtime.feeds import check_feed
from gqa_export.runtime.session import Step
from gqa_export.spec import AttentionSpec, ModelSpec
from gqa_export.validation.refusals import judge_refusals
from gqa_export.validation.run_cases import run_cases
from gqa_export.validation.sessions import Sessions

from .conftest import Scripted, verdict_of


def spec(*windows: int, vocabulary: int = 300) -> ModelSpec:
    layers = tuple(AttentionSpec(i, 4, 2, 8, 8, 1.0, window=w) for i, w in enumerate(windows or (0,)))
    return ModelSpec("x", "", vocabulary, 32, 512, "", layers)


def plan(level="full", capacity=256, windows=(0,), **options):
    return plan_suite(Setting(spec(*windows), capacity, 16, **options), level)


def by_name(found):
    return {case.name: case for case in found.cases}


@settings(max_examples=30, deadline=None)
@given(capacity=st.integers(8, 2000), window=st.integers(0, 700), original=st.integers(0, 700),
       switch=st.integers(0, 700), vocabulary=st.sampled_from([5, 300, 60_000]), literal=st.booleans(),
       whole=st.booleans(), level=st.sampled_from(LEVELS))
def test_no_case_of_any_level_ever_exceeds_its_capacity(capacity, window, original, switch, vocabulary, literal, whole,
                                                        level):
    setting = Setting(spec(window, 0, vocabulary=vocabulary), capacity, 16, original_positions=original,
                      switch=switch, special=(0, 2), largest=(1, 3), literal=literal, whole_row_masks=whole)
    for case in plan_suite(setting, level).cases:
        assert case.capacity <= capacity
        for row, prompt in enumerate(case.prompts):
            assert len(prompt) + sum(count[row] for count in case.counts) <= (case.capacity or capacity), case.name
            assert np.isin(prompt, np.arange(vocabulary)).all()
        assert case.entry in [entry.name for entry in SUITE]
        # what one side is fed token by token must mean the same to the other at once: not across longrope's switch
        assert not case.single or max(len(prompt) for prompt in case.prompts) <= (switch or capacity)
        # one step's logits of all rows stay near the budget that keeps memory bounded
        assert case.chunk <= max(16, (1 << 24) // vocabulary) or case.batch > 1


def test_every_line_of_the_suite_gives_a_case_where_there_is_room():
    found = {case.entry for case in plan(windows=(16,), capacity=2048, original_positions=64, switch=64,
                                         text=np.arange(9), whole_row_masks=True, rings=((24, 16),)).cases}
    assert found == {entry.name for entry in SUITE} - {"refusals", "in_place"}  # those are judged beside the cases
    assert all(entry.aim for entry in SUITE)


def test_masks_with_all_ones_first_are_sent_to_a_bundle_that_takes_them():
    assert "whole_row_mask" not in by_name(plan("quick"))
    found = by_name(plan("quick", whole_row_masks=True))
    assert [case.name for case in found.values() if case.whole_row_mask] == ["whole_row_mask"]
    case = found["whole_row_mask"]
    assert len({len(prompt) for prompt in case.prompts}) == case.batch == 2
    assert set(case.counts) == {(1,) * case.batch}
    others = by_name(plan("full", whole_row_masks=True))
    for name, one in by_name(plan("full")).items():
        assert all(np.array_equal(a, b) for a, b in zip(one.prompts, others[name].prompts)), name


def test_quick_is_a_part_of_full():
    quick, full = (list(by_name(plan(level, windows=(16,)))) for level in LEVELS)
    assert quick == full[: len(quick)]
    assert len(quick) < len(full)


def test_the_rows_around_a_window_are_one_less_equal_and_one_more_and_four_times():
    found = by_name(plan(windows=(16, 40)))
    for window in (16, 40):
        assert [len(p) for p in found[f"window {window}"].prompts] == [window - 1, window, window + 1]
        assert len(found[f"window {window} x 4"].prompts[0]) == 4 * window


def test_a_window_that_only_the_checkpoint_names_is_reached_too():
    """An exporter that lost a window wrote a manifest without it."""
    blind, seeing = plan("quick"), plan("quick", windows=(0,))
    assert len(by_name(blind)["teacher_forced"].prompts[0]) < 100
    seeing = plan_suite(Setting(spec(0), 256, 16, windows=(100,)), "quick")
    assert len(by_name(seeing)["teacher_forced"].prompts[0]) > 100


def test_the_edge_is_filled_exactly_and_the_brim_is_the_whole_capacity():
    found = by_name(plan(capacity=300))
    for name, capacity in (("last_slots", 24), ("full_capacity", 300)):
        case = found[name]
        assert len(case.prompts[0]) + sum(count[0] for count in case.counts) == capacity
        assert case.capacity in (0, capacity)


@pytest.mark.parametrize(("heads", "capacity"), [(9, 4096), (4, 512), (64, 8192)])
def test_a_piece_of_a_long_prompt_is_bounded_by_its_scores_too(heads, capacity):
    """Eager attention holds the scores [heads, piece, past] of a layer twice in fp64, beside the baseline's: of
    SmolLM2's 4,096 tokens in pieces of 341 that was more than its logits."""
    layers = (AttentionSpec(0, heads, 1, 8, 8, 1.0), AttentionSpec(1, 2, 1, 8, 8, 1.0))
    found = by_name(plan_suite(Setting(ModelSpec("x", "", 49152, 32, 512, "", layers), capacity, 16), "full"))
    case = found["full_capacity"]
    most, logits = SCORE_ELEMENTS // (heads * len(case.prompts[0])), (1 << 24) // 49152
    assert case.chunk == (max(LEAST_PIECE, min(most, logits)) if capacity > 1024 else logits)
    assert sum(length for (length,) in case._pieces()) == len(case.prompts[0])  # nothing of it is left out
    # short prompts come as before, those of several rows at once
    assert found["ragged"].feeds == 1 + len(found["ragged"].counts)
    assert found["drift"].chunk == 64


def test_what_had_no_room_is_said():
    notes = " ".join(plan(capacity=100, windows=(60,), original_positions=90).notes)
    for words in ("four windows of 60", "original 90 positions", "100 steps of drift instead of 1024"):
        assert words in notes


def test_an_unknown_level_is_refused():
    with refused("E-OPTION-LEVEL"):
        plan("slow")


class Checked(Scripted):
    """A scripted decoder that refuses like a real session."""

    def step(self, input_ids, new_lengths=None, *, want_cache=False):
        _, new = check_feed(input_ids, new_lengths, self.lengths, self.capacity, self.vocabulary)
        return super().step(input_ids, new, want_cache=want_cache)

    def left_padded(self):
        return np.full((1, 3, self.vocabulary), np.nan)


def scripted(bundle, level="full", **options):
    """The verdict on a scripted decoder over the whole suite."""
    reference, eager = Checked(), Checked(noise=1e-6)
    found = plan_suite(Setting(reference.spec, 256, 8, special=(0,), largest=(3, 4), **options), level)
    return verdict_of(run_cases(Sessions(reference, eager, bundle), found), found)


def test_a_decoder_that_rounds_like_pytorch_passes_the_whole_suite():
    verdict = scripted(Checked(noise=1e-6))
    assert verdict.passed, str(verdict.first)
    entries = {case.entry for case in verdict.cases}
    assert {"stepwise", "drift", "empty", "full_capacity", "vocabulary", "chunks", "permuted"} <= entries


def test_a_fault_after_two_hundred_tokens_is_found_by_full_alone():
    def edit(t, logits):
        if t >= 200:
            logits[0] += 1e-3

    assert scripted(Checked(edit), "quick").passed
    verdict = scripted(Checked(edit))
    assert {case.name for case in verdict.cases if not case.passed} == {"drift", "full_capacity"}
    assert next(case for case in verdict.cases if case.name == "drift").first.axes["token"] == 200


def test_tokens_one_by_one_are_compared_with_a_whole_piece():
    bundle = Checked(noise=1e-6)
    scripted(bundle)
    reference_pieces = by_name(plan(capacity=256))["drift"]
    assert reference_pieces.single
    assert reference_pieces.chunk == 64
    assert sum(ids.shape == (1, 1) for ids in bundle.fed) > 256  # the drift case alone takes that many single steps


def test_drift_is_a_thousand_steps_and_keeps_no_logits_of_them():
    reference = Checked()
    setting = Setting(reference.spec, 2048, 8)
    case = by_name(plan_suite(setting, "full"))["drift"]
    assert len(case.prompts[0]) == DRIFT_STEPS == 1024
    # what a step may hold at once: one piece of logits, whatever the number of steps
    assert case.chunk * reference.vocabulary < 1 << 24


def test_whatever_must_be_refused_is_refused():
    verdict = judge_refusals(Checked())
    assert verdict.passed
    assert [kind.output for kind in verdict.kinds] == [
        "one token over the capacity", "an id equal to the vocabulary's size", "a negative id",
        "a token over the capacity, step by step", "left padding (NaN logits)"]


def test_an_answer_to_left_padding_is_a_difference():
    class Plausible(Checked):
        def left_padded(self):
            return np.zeros((1, 3, self.vocabulary))

    verdict = judge_refusals(Plausible())
    assert not verdict.passed
    assert "left padding" in str(verdict.first)


def test_a_session_that_goes_on_past_its_capacity_is_a_difference():
    class Careless(Scripted):
        def step(self, input_ids, new_lengths=None, *, want_cache=False):
            self.lengths = self.lengths + input_ids.shape[1]
            return Step(np.zeros((*input_ids.shape, self.vocabulary)))

    verdict = judge_refusals(Careless())
    assert {kind.output for kind in verdict.kinds if not kind.passed} >= {"a token over the capacity, step by step"}


def test_metrics_are_what_their_names_say():
    random = np.random.default_rng(3)
    expected = random.normal(size=(6, 50))
    got = expected.copy()
    got[2, 7] += 40.0  # one token's best changes
    tally = LogitTally()
    tally.add(expected, got)
    found = tally.metrics()
    p, q = (np.exp(log_softmax(side[2])) for side in (expected, got))
    assert found.tokens == 6
    assert found.top1 == pytest.approx(5 / 6)
    assert found.max_kl == pytest.approx(float((p * np.log(p / q)).sum()))
    assert found.mean_kl == pytest.approx(found.max_kl / 6)
    assert found.max_rel == pytest.approx(40 / np.abs(expected[2]).max())
    assert 0.9 < found.top5 < 1


def test_perplexity_over_pieces_is_perplexity_at_once():
    random = np.random.default_rng(4)
    logits, ids = random.normal(size=(40, 30)), random.integers(0, 30, 40)
    whole, pieces = LogitTally(), LogitTally()
    for tally, size in ((whole, 40), (pieces, 7)):
        for start in range(0, 40, size):
            part = logits[start: start + size]
            tally.add(part, part)
            tally.read(ids[start: start + size], part, part + 0.5)  # a constant changes no prediction
    expected = np.exp(-np.mean([log_softmax(row)[token] for row, token in zip(logits[:-1], ids[1:])]))
    for tally in (whole, pieces):
        assert tally.metrics().perplexity == pytest.approx((expected, expected))


def test_a_text_is_read_and_its_perplexity_told():
    verdict = scripted(Checked(noise=1e-6), "quick", text=np.arange(90) % 12)
    case = next(case for case in verdict.cases if case.name == "text")
    ours, theirs = case.metrics.perplexity
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert case.prompt_lengths == (90,)


def test_the_greedy_prefix_ends_where_the_tokens_part():
    def edit(t, logits):
        if t == 26:
            logits[logits.argmin()] = logits.max() + 1

    verdict = scripted(Checked(edit), "quick")
    free = next(case for case in verdict.cases if case.name == "free_running")
    assert free.metrics.greedy_prefix == 3  # the tokens after positions 23, 24 and 25 were the same
    same = next(case for case in scripted(Checked(noise=1e-6), "quick").cases if case.name == "free_running")
    assert same.metrics.greedy_prefix == 8


def test_a_switch_is_crossed_in_decode_and_passed_in_a_prompt_at_every_level():
    for level in LEVELS:
        found = by_name(plan(level, switch=40))
        near, few = found["switch"].prompts
        assert len(near) < 40 < len(near) + len(found["switch"].counts)
        assert len(few) + len(found["switch"].counts) < 40
        assert [len(prompt) for prompt in found["switched"].prompts] == [41, 5]
    assert "switch" not in by_name(plan())
    assert any("second table" in note for note in plan("quick", capacity=48, switch=40).notes)
