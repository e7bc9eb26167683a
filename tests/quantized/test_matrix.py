"""The form of quantized weights: what its numbers mean, and that wrong forms are not made."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from refusal import refused

from gqa_export.errors import InvalidCheckpoint
from gqa_export.quantized.facts import Form
from gqa_export.quantized.matrix import LEVELS, QuantizedMatrix, Stripe


def matrix(stripe: Stripe, bits: int = 4, block: int = 4, kind: str = "int", offset: str = "none",
           **more: object) -> QuantizedMatrix:
    return QuantizedMatrix(stripe.codes.shape, bits, block, kind, offset, "test",
                           lambda start, stop: stripe.rows(slice(start, stop)), **more)  # type: ignore[arg-type]


def test_the_levels_are_those_of_the_types() -> None:
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(LEVELS["e4m3"], codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64))
    np.testing.assert_array_equal(LEVELS["e2m1"], codes[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float64))
    np.testing.assert_array_equal(LEVELS["nf4"], LEVELS["nf4"].astype(np.float32))
    assert np.all(np.diff(LEVELS["nf4"]) > 0)
    np.testing.assert_array_equal(LEVELS["fp4"][:8], np.float32([0, 1 / 192, 2 / 3, 1, 1 / 3, .5, 1 / 6, .25]))


def test_offsets_a_partial_block_and_stripes() -> None:
    codes, scale = np.array([[1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]], np.uint8), np.float32([[2, 3], [4, 5]])
    zero, minimum = np.array([[1, 16], [8, 0]], np.int16), np.float32([[.5, .25], [-1, -2]])
    scales, zeros = scale[:, [0, 0, 0, 0, 1, 1]], zero[:, [0, 0, 0, 0, 1, 1]]
    affine = matrix(Stripe(codes, scale, zero), offset="zero")
    np.testing.assert_array_equal(affine.dequantize(), scales * (codes.astype(float) - zeros))
    np.testing.assert_array_equal(affine.dequantize(1, 2), affine.dequantize()[1:])
    least = matrix(Stripe(codes, scale, minimum=minimum), offset="minimum")
    np.testing.assert_array_equal(least.dequantize(), scales * codes + minimum[:, [0, 0, 0, 0, 1, 1]])
    plain = matrix(Stripe(codes.astype(np.int8) - 8, scale), global_scale=.5)
    np.testing.assert_array_equal(plain.dequantize(), .5 * scales * (codes.astype(float) - 8))
    assert [*plain.stripes(1)] == [(0, 1), (1, 2)]


def test_columns_go_back_to_their_places_before_they_are_scaled() -> None:
    codes, order = np.array([[1, 2, 3]], np.int8), np.array([2, 0, 1], np.int32)
    made = matrix(Stripe(codes, np.ones((1, 1), np.float32)), block=3, column_order=order,
                  column_scale=np.float32([10, 100, 1000]))
    np.testing.assert_array_equal(made.dequantize(), [[20, 300, 1000]])


def test_a_transposed_parameter() -> None:
    codes = np.arange(6, dtype=np.int8).reshape(3, 2)
    made = QuantizedMatrix((1, 3, 2), 8, 2, "int", "none", "test",
                           lambda start, stop: Stripe(codes[start:stop], np.ones((stop - start, 1), np.float32)),
                           transposed=True)
    assert made.parameter_shape == (1, 2, 3)
    np.testing.assert_array_equal(made.parameter(), codes.T[None])


@pytest.mark.parametrize("wrong", [{"bits": 7}, {"kind": "e5m2"}, {"offset": "half"}, {"block": 0}, {"block": 5},
                                   {"kind": "nf4", "offset": "zero"}, {"column_order": np.array([0, 0, 1, 2])}])
def test_forms_that_do_not_exist_are_not_made(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"bits|kind|offset|blocks|permutation"):
        matrix(Stripe(np.zeros((1, 4), np.int8), np.ones((1, 1), np.float32)), **wrong)


@pytest.mark.parametrize("stripe", [
    Stripe(np.zeros((2, 4), np.uint8), np.ones((2, 1), np.float32)),
    Stripe(np.zeros((2, 4), np.int8), np.ones((2, 2), np.float32)),
    Stripe(np.zeros((2, 4), np.int8), np.ones((2, 1), np.float64))])
def test_a_stripe_of_another_form_is_found(stripe: Stripe) -> None:
    with pytest.raises(ValueError, match=r"^test: "):
        matrix(stripe).dequantize()


@pytest.mark.parametrize(("part", "tensor", "more"), [
    ("minimum", "m.zero", {"offset": "minimum"}), ("column scale", "m.pre_quant_scale", {}),
    ("scale", "m.weight_scale or m.weight_scale_2", {})])
def test_a_number_that_is_not_finite_is_named_with_the_tensors_it_may_come_from(part: str, tensor: str,
                                                                                more: dict[str, Any]) -> None:
    bad = np.float32([[1, np.inf]])
    good = np.ones((1, 2), np.float32)
    if part == "column scale":
        more = {"column_scale": np.float32([1, 2, 3, np.nan, 5, 6, 7, 8])}
    stripe = Stripe(np.ones((1, 8), np.uint8 if part == "minimum" else np.int8), bad if part == "scale" else good,
                    minimum=bad if part == "minimum" else None)
    names = ("m.weight", "m.weight_scale", "m.weight_scale_2", "m.zero", "m.pre_quant_scale", "m.input_scale")
    with refused("E-CKPT-QUANT-NAN", InvalidCheckpoint) as caught:
        matrix(stripe, tensors=names, **more).dequantize()
    assert caught.error.where == f"module m, tensor {tensor}"
    assert caught.error.what.startswith(f"the {part} of {'column 3' if 'column' in part else 'row 0, columns 4 to 7'} ")


@pytest.mark.parametrize("change", [
    {"operator": "MatMulNBits"}, {"bits": 4}, {"block": 64}, {"zeros": True}, {"shift": True}, {"half": True},
    {"signed": True}, {"columns_first": True}, {"kind": "e2m1"}, {"scales": "bfloat16"}, {"per": "row"},
    {"positive": True}])
def test_forms_that_differ_in_anything_have_names_of_their_own(change: dict[str, object]) -> None:
    """Parts of two forms of one matrix would be taken for one another."""
    form = Form("DequantizeLinear", 8, 32, kind="e4m3", scales="float32")
    assert replace(form, **change).key != form.key
    assert {field.name for field in fields(Form)} == {
        "operator", "bits", "block", "zeros", "shift", "half", "signed", "columns_first", "kind", "scales", "per",
        "positive"}, "a new field: let the key tell it, and name it above"
