"""How differences are measured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_export.compare import metrics, shares
from gqa_export.compare.logits import LogitTally
from gqa_export.compare.metrics import difference, last_rows, margin


def random(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def test_equal_arrays_differ_by_nothing():
    a = random(2, 5, 7)
    found = difference(a, a.copy())
    assert found.max_abs == 0
    assert found.nonfinite == 0
    assert found.first_over(0.0) is None
    assert found.scale == np.abs(a).max()


def test_logits_are_located_by_batch_token_and_id():
    a = random(2, 5, 7)
    b = a.copy()
    b[1, 3, 6] += 0.5
    element = difference(a, b).first_over(0.1)
    assert element.axes == {"batch": 1, "token": 3, "id": 6}
    assert element.expected == a[1, 3, 6]
    assert element.got == b[1, 3, 6]
    assert element.gap == pytest.approx(0.5)


def test_cache_rows_are_located_by_batch_token_head_and_feature():
    a = random(3, 2, 4, 5)  # B K S D
    b = a.copy()
    b[2, 1, 3, 4] -= 0.25
    assert difference(a, b).first_over(0.1).axes == {"batch": 2, "token": 3, "head": 1, "feature": 4}


def test_the_first_token_over_the_bound_is_named_not_the_worst():
    a = random(1, 2, 6, 3)
    b = a.copy()
    b[0, 0, 2, 1] += 0.2
    b[0, 1, 5, 0] += 9.0
    found = difference(a, b)
    assert found.max_abs == pytest.approx(9.0)
    assert found.first_over(0.1).axes["token"] == 2
    assert found.first_over(1.0).axes == {"batch": 0, "token": 5, "head": 1, "feature": 0}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["expected", "got", "both"])
def test_anything_not_finite_is_an_infinite_difference(bad, side):
    a, b = random(1, 4, 3), random(1, 4, 3)
    if side != "got":
        a[0, 2, 1] = bad
    if side != "expected":
        b[0, 2, 1] = bad
    found = difference(a, b)
    assert found.nonfinite == 1
    assert found.max_abs == np.inf
    assert found.first_over(1e30).axes == {"batch": 0, "token": 2, "id": 1}
    assert np.isfinite(found.scale)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        difference(random(1, 4, 3), random(1, 4, 2))


def test_an_empty_output_differs_by_nothing():
    assert difference(np.zeros((1, 2, 0, 4)), np.zeros((1, 2, 0, 4))).max_abs == 0


def test_low_precision_is_compared_in_fp64():
    a = random(1, 3, 8)
    found = difference(a, a.astype(np.float16))
    assert found.max_abs == np.abs(a - a.astype(np.float16).astype(np.float64)).max() > 0


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 9), width=st.integers(1, 9), block=st.integers(1, 40),
       seed=st.integers(0, 99))
def test_blocks_change_nothing(batch, tokens, width, block, seed):
    a, b = random(batch, tokens, width, seed=seed), random(batch, tokens, width, seed=seed + 100)
    before = metrics.BLOCK
    metrics.BLOCK = block
    try:
        found = difference(a, b)
    finally:
        metrics.BLOCK = before
    assert np.array_equal(found.gap, np.abs(a - b).max(-1))
    assert np.array_equal(found.place, np.abs(a - b).argmax(-1))


def test_last_rows_follow_each_rows_length():
    logits = random(3, 4, 2)
    assert np.array_equal(last_rows(logits, np.array([4, 1, 2])), logits[[0, 1, 2], [3, 0, 1]])
    assert np.array_equal(last_rows(logits[:, :1], np.array([4, 1, 2])), logits[:, 0])


def test_margin_is_zero_for_the_best_token_itself():
    row = np.array([0.5, 2.0, 1.75])
    assert margin(row, 1) == 0
    assert margin(row, 2) == 0.25


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["expected", "got", "both"])
def test_what_is_not_finite_is_counted_once_and_located_beside_finite_blocks(bad, side, monkeypatch):
    """A block without such an element is compared by a shorter way: both ways must agree."""
    monkeypatch.setattr(metrics, "BLOCK", 7)  # a block for each token
    a, b = random(2, 5, 7), random(2, 5, 7, dtype=np.float32, seed=1)
    whole = difference(a, b)
    for array in (a, b) if side == "both" else (a,) if side == "expected" else (b,):
        array[1, 3, 4] = bad
    found = difference(a, b)
    assert found.nonfinite == 1
    assert found.gap[1, 3] == np.inf
    assert found.place[1, 3] == 4
    others = np.ones((2, 5), bool)
    others[1, 3] = False
    assert np.array_equal(found.gap[others], whole.gap[others])
    assert np.array_equal(found.place[others], whole.place[others])
    assert found.scale == np.abs(np.where(np.isfinite(a), a, 0)).max()


@pytest.mark.parametrize("bad", [None, np.nan])
def test_on_any_number_of_cores_the_differences_are_the_same(monkeypatch, bad):
    """Rows are measured in shares, by threads: what is found of a row must not depend on the share it is in."""
    expected = random(1, 131, 2 * shares.LEAST // 100)
    got = expected + random(*expected.shape, seed=1) * 1e-3
    if bad is not None:
        got[0, 70, 5] = bad
    found, used = [], []
    for cores in (1, 2, 5):
        monkeypatch.setattr(shares, "cores", lambda cores=cores: cores)
        whole = difference(expected, got)
        tally = LogitTally()
        tally.add(expected[0], got[0])
        found.append([*(getattr(whole, name).tobytes() for name in ("gap", "place", "expected", "got")), whole.scale,
                      whole.nonfinite, tally.metrics()])
        used.append(len(shares.in_shares(lambda rows: rows, *expected.shape[1:])))
    assert repr(found[0]) == repr(found[1]) == repr(found[2])
    assert used == [1, 2, 2]  # a share is not smaller than pays


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 7))
def test_shares_are_all_rows_once_and_begin_at_blocks(count, block, cores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "cores", lambda: cores)
        patch.setattr(shares, "LEAST", 1)
        found = shares.in_shares(lambda rows: rows, count, 3, block)
    assert [row for rows in found for row in range(rows.start, rows.stop)] == list(range(count))
    assert all(rows.start % block == 0 for rows in found)
    assert len(found) <= cores
