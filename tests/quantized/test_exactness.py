"""Whether fp16 and bf16 hold the values of codes: what types tell is what a rounding of the values shows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gqa_export.quantized.exactness import holds, holds_type, holds_values
from gqa_export.quantized.facts import E4M3, Form, facts_of, nbits_form
from gqa_export.quantized.matrix import QuantizedMatrix, Stripe

TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, E4M3: ml_dtypes.float8_e4m3fn}


def matrix(kind: str, bits: int, scales: str) -> QuantizedMatrix:
    """Every code, under scales of a type whose last digits are not 0, or that are powers of two."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 1 << bits, (16, 512)).astype(np.uint8)
    if kind == "e4m3":
        codes[codes & 127 == 127] = 0  # not numbers
    scale = (1 + random.random((16, 16))).astype(np.float32)
    powers = scales == "powers"
    dtype = "bfloat16" if powers else scales
    scale = np.exp2(np.rint(scale)).astype(np.float32) if powers else scale.astype(TYPES[dtype]).astype(np.float32)
    whole = (codes.astype(np.int16) - (1 << bits - 1)).astype(np.int8) if kind == "int" else codes
    return QuantizedMatrix((16, 512), bits, 32, kind, "none", "x", lambda start, stop: Stripe(
        whole[start:stop], scale[start:stop]), scale_dtype=dtype, powers=powers)


def survives(values: np.ndarray, dtype: str) -> bool:
    return np.array_equal(values.astype(TYPES[dtype]).astype(np.float64), values)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scales", ["float16", "bfloat16", "float32", E4M3, "powers"])
@pytest.mark.parametrize(("kind", "bits"), [("int", 4), ("int", 8), ("e4m3", 8), ("e2m1", 4)])
def test_types_tell_what_a_rounding_shows(kind: str, bits: int, scales: str, dtype: str) -> None:
    """Of scales between 1 and 2. Of fp16's range types tell less: it may be left where these values do not leave it."""
    made = matrix(kind, bits, scales)
    exact = survives(made.dequantize().astype(np.float64), dtype)
    unknown = dtype == "float16" and (scales == "powers" or kind == "e4m3" or scales == "bfloat16")
    if unknown:
        assert not holds_values(made, dtype)
    else:
        assert holds_values(made, dtype) == exact
    assert holds_values(made, "float32")


@pytest.mark.parametrize(("scales", "dtype", "exact"), [
    ("float16", "float16", True), ("float16", "bfloat16", False), ("bfloat16", "bfloat16", True),
    ("bfloat16", "float16", False), ("powers", "bfloat16", True), ("float32", "bfloat16", False)])
def test_an_operator_that_reads_codes_needs_its_scales_alone(scales: str, dtype: str, exact: bool) -> None:
    """A float16 scale is cast to a bf16 graph's format: 2^-9 of it is lost."""
    made = matrix("int", 4, scales)
    form = nbits_form(facts_of(made))
    assert isinstance(form, Form)
    assert holds(made, form, dtype) == exact
    assert holds(made, form, "float32")


def test_a_plain_weight_is_held_by_formats_with_all_its_numbers() -> None:
    formats = ("float16", "bfloat16", "float32")
    assert {(a, b) for a in formats for b in formats if holds_type(a, b)} == {
        ("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float16"), ("float32", "bfloat16"),
        ("float32", "float32")}
    for dtype in formats:  # of every number of float8
        numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        assert holds_type(dtype, E4M3)
        assert survives(numbers[np.isfinite(numbers)], dtype)
