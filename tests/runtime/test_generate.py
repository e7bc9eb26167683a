"""The decode loop over a scripted session, and over a real one against transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
from refusal import refused

from gqa_export.runtime.generate import END, FULL, LIMIT, generate
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.runtime.sampling import Sampling
from gqa_export.runtime.session import Step

from .conftest import CAPACITY

SIZE = 10


class Counting:
    """Each token t is followed by t + 1 (modulo SIZE). Remembers what it was fed."""

    spec = None

    def __init__(self, capacity: int = 100, last_only: bool = False, noise: float = 0.0) -> None:
        self.capacity, self.last_only, self.noise = capacity, last_only, noise
        self.lengths, self.fed = np.zeros(0, np.int64), []

    def reset(self, batch: int) -> None:
        self.lengths, self.fed = np.zeros(batch, np.int64), []

    def step(self, input_ids, new_lengths=None, *, want_cache=False) -> Step:
        new = np.full(len(input_ids), input_ids.shape[1]) if new_lengths is None else new_lengths
        assert (self.lengths + new <= self.capacity).all()
        self.fed.append((input_ids.tolist(), new.tolist()))
        self.lengths = self.lengths + new
        logits = np.eye(SIZE, dtype=np.float32)[(input_ids + 1) % SIZE] * 5
        logits += self.noise
        if self.last_only:
            logits = logits[np.arange(len(new)), np.maximum(new - 1, 0)][:, None]
        return Step(logits)

    def cache(self) -> list:
        return []


@pytest.mark.parametrize("last_only", [False, True])
def test_ragged_prompts_go_on_from_their_own_last_token(last_only) -> None:
    result = generate(Counting(last_only=last_only), [[1, 2, 3], [5]], 3)
    assert result.tokens == [[4, 5, 6], [6, 7, 8]]
    assert result.finish == [LIMIT, LIMIT]
    assert (result.prompt_tokens, result.decode_steps, result.decoded) == (4, 2, 4)


def test_any_of_several_end_tokens_ends_its_own_row_only() -> None:
    result = generate(Counting(), [[1], [6]], 5, {3, 8})
    assert result.tokens == [[2, 3], [7, 8]]
    assert result.finish == [END, END]
    result = generate(Counting(), [[1], [6]], 5, [3])
    assert result.tokens == [[2, 3], [7, 8, 9, 0, 1]]
    assert result.finish == [END, LIMIT]


def test_tokens_are_shown_as_they_come_end_tokens_included() -> None:
    shown: list[tuple[int, int]] = []
    generate(Counting(), [[1], [6]], 3, {3}, lambda row, token: shown.append((row, token)))
    assert shown == [(0, 2), (1, 7), (0, 3), (1, 8), (1, 9)]


def test_a_full_cache_stops_a_row_and_the_others_go_on() -> None:
    session = Counting(capacity=5)
    result = generate(session, [[1, 2, 3, 4], [5]], 4)
    # four in the cache, one more fed, and its successor is still known
    assert result.tokens == [[5, 6], [6, 7, 8, 9]]
    assert result.finish == [FULL, LIMIT]
    assert session.fed[-1][1] == [0, 1]


def test_a_prompt_as_long_as_the_capacity_gives_one_token() -> None:
    assert generate(Counting(capacity=3), [[1, 2, 3]], 9).tokens == [[4]]


@pytest.mark.parametrize("piece", [1, 2, 3, 512])
def test_prompts_fed_in_pieces_give_the_same(piece) -> None:
    session = Counting()
    result = generate(session, [[1, 2, 3, 4, 5], [7, 8]], 2, prefill_piece=piece)
    assert result.tokens == [[6, 7], [9, 0]]
    assert max(len(ids[0]) for ids, _ in session.fed) <= piece


@pytest.mark.parametrize(("prompts", "count", "code"), [
    ([[]], 3, "E-RUN-PROMPT"),
    ([], 3, "E-RUN-PROMPT"),
    ([[1], []], 3, "E-RUN-PROMPT"),
    ([[1] * 6], 3, "E-RUN-CAPACITY"),
    ([[1]], 0, "E-OPTION-MAX-NEW-TOKENS"),
])
def test_what_cannot_be_generated_is_refused_before_a_step(prompts, count, code) -> None:
    session = Counting(capacity=5)
    with refused(code):
        generate(session, prompts, count)
    assert session.fed == []


def test_logits_that_are_not_numbers_are_refused() -> None:
    with refused("E-RUN-NAN"):
        generate(Counting(noise=float("nan")), [[1]], 3)


@pytest.mark.parametrize("sampling", [
    Sampling(temperature=1.0, top_k=1, seed=0),
    Sampling(temperature=1.0, top_p=1e-6, seed=0),
    Sampling(temperature=1e-3, seed=0),
])
def test_sampling_from_one_token_is_greedy(sampling) -> None:
    assert generate(Counting(), [[1]], 8, sampling=sampling).tokens == generate(Counting(), [[1]], 8).tokens


def test_a_seed_repeats_and_another_one_does_not() -> None:
    first, again, other = (generate(Counting(), [[1]], 40, sampling=Sampling(3.0, seed=seed)).tokens
                           for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_sampled_frequencies_follow_the_softmax_within_top_k_and_top_p() -> None:
    class Fixed(Counting):
        def step(self, input_ids, new_lengths=None, *, want_cache=False) -> Step:
            super().step(input_ids, new_lengths)
            return Step(np.log(np.array([[[4.0, 3.0, 2.0, 1.0]]], dtype=np.float32)))

    def frequencies(**choice) -> np.ndarray:
        tokens = generate(Fixed(4001), [[0]], 4000, sampling=Sampling(1.0, seed=1, **choice)).tokens[0]
        return np.bincount(tokens, minlength=4) / 4000

    # four standard deviations of a share of one half among 4000 draws
    bound = 4 * np.sqrt(0.25 / 4000)
    assert np.abs(frequencies() - [0.4, 0.3, 0.2, 0.1]).max() < bound
    assert np.abs(frequencies(top_k=2) - [4 / 7, 3 / 7, 0, 0]).max() < bound
    assert np.abs(frequencies(top_p=0.75) - [4 / 9, 3 / 9, 2 / 9, 0]).max() < bound


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("inf")}, {"temperature": float("nan")},
                                   {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_out_of_range_is_refused(wrong) -> None:
    with refused("E-OPTION-SAMPLING"):
        Sampling(**wrong)


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_greedy_tokens_of_a_ragged_batch_equal_transformers_generate(bundle, model, cache) -> None:
    import torch

    prompts = [list(range(5, 25)), [9], [30, 40, 50]]
    got = generate(OrtSession.load(bundle("ort", cache), "cpu"), prompts, 20).tokens
    for prompt, tokens in zip(prompts, got):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None,
                                  pad_token_id=0)
        assert tokens == expected[0, len(prompt):].tolist()


def test_a_long_prompt_in_pieces_equals_the_whole_in_a_real_batch(bundle) -> None:
    session, prompts = OrtSession.load(bundle(), "cpu"), [list(range(3, 33)), list(range(40, 47))]
    whole = generate(session, prompts, CAPACITY - 30)
    assert generate(session, prompts, CAPACITY - 30, prefill_piece=8).tokens == whole.tokens
