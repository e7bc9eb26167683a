"""Sessions over caches that are rings: prompts are cut, rows go back as far as their windows are there, and no farther.

The tiny Mistral has a window of 16; its rings have 21 slots (a prompt chunk of 5).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from refusal import refused

import gqa_export as gqa
from gqa_export.bundle.manifest import read_manifest
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.runtime.rings import dead_slots, first_length, unrolled
from gqa_export.spec import AttentionSpec, WindowCache

from .conftest import VOCABULARY
from .row_schedule import Alone, play

pytestmark = pytest.mark.whole_model
WINDOW, CHUNK, SLOTS, CAPACITY = 16, 5, 21, 96


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("rings")
    return {name: gqa.export(checkpoint, place / name, target="portable", cache="static", capacity=CAPACITY,
                             **options).folder
            for name, options in (("small", {"window_cache": "small", "prompt_chunk": CHUNK}), ("full", {}))}


@pytest.fixture
def pair(folders):
    """(over rings, over a cache that keeps all)"""
    return tuple(OrtSession.load(folders[name], "cpu") for name in ("small", "full"))


def fed(sessions, ids, counts=None):
    """The same step in both; logits alike to fp32 rounding (sums in another order: 1e-5 of logits below 1)."""
    one, other = (session.step(ids, counts, want_cache=True) for session in sessions)
    new = np.full(len(ids), ids.shape[1]) if counts is None else counts
    for b, count in enumerate(new):
        np.testing.assert_allclose(one.logits[b, :count], other.logits[b, :count], atol=1e-5)
        for mine, theirs in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
            np.testing.assert_allclose(mine[b, :, :count], theirs[b, :, :count], atol=1e-5)
    return one


def test_a_prompt_of_any_length_is_cut_into_chunks_and_gives_what_the_whole_gives(pair) -> None:
    random = np.random.default_rng(3)
    for session in pair:
        session.reset(3)
    fed(pair, random.integers(0, VOCABULARY, (3, 70)), np.array([70, 23, 4]))
    for counts in ((1, 1, 1), (0, 7, 1), (3, 0, 12)):
        fed(pair, random.integers(0, VOCABULARY, (3, max(counts))), np.array(counts))
    small, full = (session.cache() for session in pair)
    for b, length in enumerate(pair[0].lengths.tolist()):
        for mine, theirs in zip(small, full, strict=True):
            for ring, every in zip(mine, theirs):
                kept = slice(max(0, length - SLOTS), length)
                np.testing.assert_allclose(ring[b, :, kept], every[b, :, kept], atol=1e-5)
                assert not ring[b, :, : kept.start].any()


def test_a_ring_takes_the_bytes_of_its_slots(folders) -> None:
    facts = {fact.name: fact.shape for fact in read_manifest(folders["small"]).inputs}
    assert facts["past_key_values.0.key"] == ("batch", 2, SLOTS, 16)
    small, full = (gqa.inspect(folders[name]).costs[-1] for name in ("small", "full"))
    assert (small.tokens, full.tokens) == (CAPACITY, CAPACITY)
    assert small.bytes * CAPACITY == full.bytes * SLOTS
    assert small.mha_bytes == 2 * small.bytes


def test_every_row_of_a_random_schedule_is_as_if_it_were_alone(folders) -> None:
    opened = lambda: OrtSession.load(folders["small"], "cpu")  # noqa: E731
    count = play(opened(), Alone(opened()), 150, seed=9, vocabulary=VOCABULARY, longest=CAPACITY - 4, marks=False,
                 rings=True)
    assert min(count.values()) > 10


def test_a_row_goes_back_a_chunk_behind_its_farthest_token_and_no_farther(pair) -> None:
    """At length l a row sees from l - 15 on; of a row that reached 60 the ring has 39 .. 59, so l is 54 at least."""
    ids = np.random.default_rng(4).integers(0, VOCABULARY, (1, 60))
    for session in pair:
        session.reset(1)
        session.step(ids)
    small = pair[0]
    with refused("E-RUN-ROW-WINDOW"):
        small.rewind_row(0, 53)
    assert (small.nearest_length(0, 53), small.nearest_length(0, 54), small.nearest_length(0, 200)) == (0, 54, 60)
    for session in pair:
        session.rewind_row(0, 56)
    with refused("E-RUN-ROW-WINDOW"):
        small.rewind_row(0, 50)  # six less than 56, but the ring was written up to 60
    for session in pair:
        session.rewind_row(0, 54)
    fed(pair, ids[:, 20:23])
    assert small.lengths.tolist() == [57]
    for session in pair:
        session.reset_row(0)
    fed(pair, ids[:, 30:50])


def test_a_copied_row_can_go_back_as_far_as_its_source(pair) -> None:
    ids = np.random.default_rng(5).integers(0, VOCABULARY, (2, 40))
    for session in pair:
        session.reset(2)
        session.step(ids, np.array([40, 3]))
        session.copy_row(0, 1, 37)
    with refused("E-RUN-ROW-WINDOW"):
        pair[0].rewind_row(1, 33)
    for session in pair:
        session.rewind_row(1, 34)
    fed(pair, ids[:, :4])


def test_before_a_slot_is_used_again_a_row_goes_back_anywhere(pair) -> None:
    ids = np.random.default_rng(6).integers(0, VOCABULARY, (1, SLOTS))
    for session in pair:
        session.reset(1)
        session.step(ids)
        session.rewind_row(0, 2)
    fed(pair, ids[:, 5:16])


def test_speculation_and_generation_are_as_without_rings(folders) -> None:
    prompt = np.random.default_rng(7).integers(3, VOCABULARY, 30).tolist()
    answers = [gqa.open_bundle(folders[name]).complete(token_ids=prompt, max_new_tokens=24, **more).tokens
               for name in ("small", "full") for more in ({}, {"speculate": "ngram"})]
    assert answers[0] == answers[1] == answers[2] == answers[3]


def test_the_least_length_follows_from_what_a_window_sees() -> None:
    """Enumerated: back to l is sound where positions max(0, l - W + 1) .. l - 1 were not displaced. (A window of 1 sees
    no earlier token; its rows go back no farther than others all the same.)"""
    for window, chunk in ((2, 1), (3, 2), (4, 1), (2, 6)):
        layer = AttentionSpec(0, 1, 1, 8, 8, 1.0, window=window)
        windows = WindowCache(chunk, (0,))
        for end in range(1, 40):
            held = set(range(max(0, end - windows.slots(layer)), end))
            least = first_length(windows, (layer,), end)
            for length in range(1, end + 1):
                sound = set(range(max(0, length - window + 1), length)) <= held
                assert sound == (length >= least), (window, chunk, end, length)


def test_dead_slots_and_unrolling_by_enumeration() -> None:
    for slots, window, length in ((5, 3, 0), (5, 3, 2), (5, 3, 5), (5, 3, 13), (4, 4, 9), (7, 1, 20)):
        held: dict[int, int] = {token % slots: token for token in range(length)}
        expected = [slot not in held or held[slot] <= length - window for slot in range(slots)]
        assert dead_slots(slots, window, np.array([length]))[0].tolist() == expected
        ring = np.array([held.get(slot, -1) for slot in range(slots)], np.float32).reshape(1, 1, slots, 1)
        whole = unrolled(ring, np.array([length]), np.array([length]))[0, 0, :, 0].tolist()
        assert whole == [token if token >= length - slots else 0 for token in range(length)]
