"""The rule by which inputs of products become codes of their weight's type: PyTorch's emulation of it beside the
nearest number of a table, and which products have none."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gqa_export.exporting.input_scales import NOT_REACHED, with_inputs
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.weight_plan import Plan
from gqa_export.quantized.combine import APART
from gqa_export.quantized.facts import MatrixFacts
from gqa_export.quantized.input_codes import NO_SCALE, InputCodes, held_as, input_codes, scale_of
from gqa_export.quantized.matrix import QuantizedMatrix
from gqa_export.targets import get_target
from gqa_export.validation.input_codes import rounded_to_codes

E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.sort([*(mantissa / 8 * 2.0**-6 for mantissa in range(8)),
                *((1 + mantissa / 8) * 2.0**power for power in range(-6, 9) for mantissa in range(8))])[:-1]
"""positive numbers of the two types, from their definition; the largest of e4m3 is 448, what would be 480 is NaN"""
FP8 = MatrixFacts((40, 96), 8, 96, "e4m3", "none", "FP8", scales="float32")


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """fp64: the number of a table that is nearest to each value, of two equally near the one with an even code; beyond
    the table its end."""
    place = np.clip(np.searchsorted(table, np.abs(values)), 1, len(table) - 1)
    low, high = table[place - 1], table[place]
    middle = (low + high) / 2
    up = (np.abs(values) > middle) | ((np.abs(values) == middle) & (place % 2 == 0))
    return np.copysign(np.where(up, high, low), values)


def as_fp8(values: np.ndarray, scale: float) -> np.ndarray:
    return nearest(values.astype(np.float64) / scale, E4M3) * scale


def values_of(scale: float) -> np.ndarray:
    """Numbers of all sizes, ties, what saturates and zeros, in fp32."""
    random = np.random.default_rng(0)
    ties = (E4M3[:-1] + E4M3[1:]) / 2
    sizes = 2.0 ** random.integers(-14, 12, 400)
    found = [random.normal(size=400) * sizes, ties, -ties, E4M3, [0, 480, -1e6, 465, 463]]
    return (np.concatenate(found) * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0078125, 0.0231, 3.7])
def test_fp8_is_the_nearest_number_and_saturates(scale: float) -> None:
    """Scales that are powers of two keep the ties. Others are divided in fp32, which may move a value over one."""
    values = values_of(scale)
    found = rounded_to_codes(torch.from_numpy(values), InputCodes("e4m3", scale)).double().numpy()
    wanted = as_fp8(values, scale)
    if math.log2(scale).is_integer():
        assert np.array_equal(found, wanted)
    else:
        apart = np.abs(found - wanted) > 1e-6 * np.abs(wanted)
        beside = np.abs(nearest(values[apart] / scale * (1 + 1e-6), E4M3) - nearest(values[apart] / scale * (1 - 1e-6),
                                                                                 E4M3))
        assert (beside > 0).all(), "apart at something that is no tie"
    assert np.abs(found).max() == pytest.approx(448 * scale)


def test_a_value_that_is_not_a_number_stays_one_and_the_type_is_kept() -> None:
    values = torch.tensor([[float("nan"), 1.0, float("inf"), -3.3]], dtype=torch.bfloat16)
    found = rounded_to_codes(values, InputCodes("e4m3", 0.5))
    assert found.dtype == torch.bfloat16
    assert found[0, 0].isnan()
    assert found[0, 2] == 224


def as_nvfp4(values: np.ndarray, scale: float) -> np.ndarray:
    """fp64. Of a block whose scale becomes 0 nothing is left."""
    blocks = values.astype(np.float64).reshape(-1, 16)
    step = as_fp8(np.abs(blocks).max(1, keepdims=True) / 6, scale)
    return (nearest(blocks / np.where(step == 0, 1, step), E2M1) * step).reshape(values.shape)


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0078125])
def test_nvfp4_is_the_nearest_number_by_the_scale_of_its_block(scale: float) -> None:
    """Blocks of zeros, of ties, of all sizes, with one large number, beyond the largest scale, below the smallest."""
    random = np.random.default_rng(1)
    values = random.normal(size=(60, 16)) * 2.0 ** random.integers(-12, 10, (60, 1))
    values[0], values[1], values[2] = 0, 6 * np.arange(16) / 15, [6, 5, 3.5, 2.5, 1.75, 1.25, .75, .25] * 2
    values[3, 5], values[4], values[5] = 2000, 5000, 2.0**-13
    values[6, :8] = -values[2, :8]
    values = (values * scale).astype(np.float32).reshape(2, 3, 160)
    found = rounded_to_codes(torch.from_numpy(values), InputCodes("e2m1", scale)).double().numpy()
    wanted = as_nvfp4(values, scale)
    apart = found != wanted
    assert apart.mean() < 0.01  # quotients are rounded to fp32, and may be ties then
    assert np.abs(found - wanted).max() <= np.abs(values).max() / 6
    blocks = found.reshape(-1, 16)
    assert not blocks[0].any()
    assert not blocks[5].any()
    assert np.array_equal(blocks[2], scale * np.array([6, 4, 4, 2, 2, 1, 1, 0] * 2))
    assert blocks[4].max() == 2688 * scale


FP4 = replace(FP8, kind="e2m1", bits=4, block=16, scales="float8_e4m3fn")


@pytest.mark.parametrize(("facts", "scale", "dtype", "words"), [
    (replace(FP4, shape=(40, 72)), 0.1, "float32", "blocks of 16 do not divide 72 columns"),
    (replace(FP4, scales="float32", block=32), 0.1, "float32", "MXFP4"),
    (replace(FP4, block=32), 0.1, "float32", "blocks of 16 alone"),
    (FP4, 1e-9, "float16", "float16 does not hold the scale 1e-09"),
    (replace(FP8, kind="int", bits=4), 0.1, "float32", "codes of integers"),
    (FP8, None, "float32", "no static scale"), (replace(FP8, block=32), 0.1, "float32", "one for 32 columns"),
    (FP8, math.nan, "float32", "does not hold"), (FP8, 0.0, "float32", "does not hold"),
    (replace(FP8, shape=(4, 40, 96)), 0.1, "float32", "stacked experts")])
def test_what_has_no_scale_says_why(facts: MatrixFacts, scale: float | None, dtype: str, words: str) -> None:
    found = input_codes(facts, scale, dtype)
    assert isinstance(found, str)
    assert words in found


@pytest.mark.parametrize(("dtype", "kind", "held"), [
    ("float32", "e2m1", np.float32(0.1)), ("float16", "e2m1", np.float16(0.1)), ("bfloat16", "e2m1", 0.10009765625),
    ("float16", "e4m3", np.float32(0.1)), ("bfloat16", "e4m3", np.float32(0.1))])
def test_a_scale_is_a_number_that_the_graph_holds(dtype: str, kind: str, held: float) -> None:
    assert input_codes(FP8 if kind == "e4m3" else FP4, 0.1, dtype) == InputCodes(kind, float(held))
    assert held_as(0.1, kind, dtype) == held


def test_the_largest_input_gets_the_largest_code() -> None:
    assert scale_of(448.0, "e4m3") == 1
    assert scale_of(2688.0, "e2m1") == 1


@pytest.mark.parametrize(("method", "matrix", "reason"), [
    ("keep", {"no_input_scale": APART}, APART), ("keep", {}, NO_SCALE), ("fp8", {}, NOT_REACHED)])
def test_why_there_is_no_scale_depends_on_where_it_would_come_from(method: str, matrix: dict, reason: str) -> None:
    """Parts of a kept whole may have scales that differ, and a text may never reach a matrix."""
    kept = QuantizedMatrix((40, 96), 8, 96, "e4m3", "none", "FP8", lambda *_: None, **matrix)
    plan = with_inputs(Plan(method, True, {"w": kept}, {"w": FP8}), ExportOptions(activations="same"),
                       get_target("trt-native"), "float32", "here")
    assert plan.exact_inputs == {"w": reason}
