"""What a bound is made of."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_export.compare.tolerance import CAP_ULPS, EPSILON, FACTOR, FLOOR_ULPS, tolerance


def test_a_measured_baseline_decides():
    found = tolerance(1e-5, 10.0, "float32")
    assert found.bound == FACTOR * 1e-5
    assert found.basis == "baseline"


def test_a_baseline_of_nothing_leaves_room_for_rounding_only():
    found = tolerance(0.0, 10.0, "float32")
    assert found.basis == "floor"
    assert found.bound == FLOOR_ULPS["float32"] * EPSILON["float32"] * 10.0


@pytest.mark.parametrize("baseline", [1.0, math.inf, math.nan])
def test_a_broken_baseline_cannot_excuse_anything(baseline):
    found = tolerance(baseline, 10.0, "float32")
    assert found.basis == "cap"
    assert found.bound == CAP_ULPS * EPSILON["float32"] * 10.0 < 2e-3


def test_the_coarsest_format_never_gets_more_than_an_eighth_of_the_scale():
    assert tolerance(1e9, 8.0, "bfloat16").bound == 1.0


def test_an_output_that_is_all_zero_must_stay_zero():
    assert tolerance(0.0, 0.0, "float32").bound == 0.0


def test_without_a_baseline_the_bound_is_assumed_and_lies_between_floor_and_cap():
    found = tolerance(None, 1.0, "float32")
    assert FLOOR_ULPS["float32"] * EPSILON["float32"] < found.bound < CAP_ULPS * EPSILON["float32"]


@given(a=st.floats(0, 1e3), b=st.floats(0, 1e3), scale=st.floats(1e-3, 1e3),
       dtype=st.sampled_from(["float32", "float16"]))
def test_a_larger_baseline_never_tightens_the_bound(a, b, scale, dtype):
    low, high = sorted((a, b))
    assert tolerance(low, scale, dtype).bound <= tolerance(high, scale, dtype).bound
