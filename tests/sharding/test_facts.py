"""Which entries of an axis a rank holds, and what becomes of them in a reshape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_export.sharding.facts import Cut, copies, even, held_heads, through_reshape
from gqa_export.spec import AttentionSpec


def layer(heads: int, kv: int) -> AttentionSpec:
    return AttentionSpec(0, heads, kv, 16, 16, 0.25)


@pytest.mark.parametrize(("heads", "kv", "ranks", "held"), [
    (8, 4, 2, ((0, 1), (2, 3))), (8, 4, 8, ((0,), (0,), (1,), (1,), (2,), (2,), (3,), (3,))),
    (9, 3, 3, ((0,), (1,), (2,))), (8, 1, 4, ((0,), (0,), (0,), (0,))), (4, 4, 2, ((0, 1), (2, 3))),
    (12, 3, 2, ((0, 0, 1), (1, 2, 2))), (24, 4, 3, ((0, 0, 0, 1), (1, 1, 2, 2), (2, 3, 3, 3)))])
def test_a_rank_holds_the_heads_that_its_queries_read(heads, kv, ranks, held):
    assert held_heads(layer(heads, kv), ranks) == held


@settings(max_examples=200, deadline=None)
@given(kv=st.integers(1, 8), group=st.integers(1, 12), ranks=st.integers(2, 8))
def test_every_query_reads_its_own_head_and_every_head_is_held_equally_often(kv, group, ranks):
    heads = kv * group * ranks
    held = held_heads(layer(heads, kv), ranks)
    mine = heads // ranks
    for rank, there in enumerate(held):
        assert mine % len(there) == 0
        for query in range(mine):
            assert there[query // (mine // len(there))] == (rank * mine + query) // (heads // kv)
    counts = np.bincount(np.concatenate(held), minlength=kv)
    assert len(set(counts.tolist())) == 1


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), split=st.data())
def test_a_cut_through_a_reshape_holds_the_same_entries(sizes, split):
    """Against numpy: cut then reshaped is reshaped then cut, wherever a cut of one axis is found at all."""
    before = (*sizes, 6)
    axis = split.draw(st.integers(0, len(before) - 1))
    whole = np.arange(np.prod(before)).reshape(before)
    places = sorted(split.draw(st.sets(st.integers(0, len(before) - 1))))
    after = [int(np.prod(part)) for part in np.split(np.array(before), places) if len(part)]
    cut = Cut(axis, even(before[axis], 2))
    found = through_reshape(cut, before, tuple(after))
    if found is None:
        return
    for rank in range(2):
        start, stop = cut.parts[rank][0]
        mine = np.take(whole, range(start, stop), axis)
        there = [i for a, b in found.parts[rank] for i in range(a, b)]
        assert np.array_equal(mine.reshape(-1), np.take(whole.reshape(after), there, found.axis).reshape(-1))


@pytest.mark.parametrize(("cut", "before", "after", "expected"), [
    (Cut(2, even(48, 2)), ("b", "s", 48), ("b", "s", 4, 12), Cut(2, even(4, 2))),
    (Cut(2, even(4, 2)), ("b", "s", 4, 12), ("b", "s", 48), Cut(2, even(48, 2))),
    (Cut(1, even(64, 2)), ("one", 64), ("two", 64), Cut(1, even(64, 2))),
    (Cut(2, even(48, 5)), ("b", "s", 48), ("b", "s", 4, 12), None)])
def test_axes_of_unknown_size_stay_what_they_are(cut, before, after, expected):
    assert through_reshape(cut, before, after) == expected


def test_copies_are_counted_and_unequal_ones_are_none():
    assert copies(even(7, 3), 7) == 1
    assert copies((((0, 4),), ((0, 4),)), 4) == 2
    assert copies((((0, 3),), ((2, 4),)), 4) == 0
    assert copies((((0, 1),), ((2, 4),)), 4) == 0
