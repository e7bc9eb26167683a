"""The kernels over caches of codes, through Triton's interpreter: the codes they write, and what they make of them.

The codes are those of the rule in fp64, but for ties; the output is held against fp64 over the codes that are there.
Tiles are 16 x 16. What is unspecified in the cache is the largest code.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_cases import (
    Case,
    assert_cache_holds_new_codes,
    coded,
    make,
    pairwise,
    run_kernels,
    truth,
    truth_of_codes,
)
from gqa_plugins.grouped_attention import attend, codes, grouped_query_attention

from gqa_export.errors import GqaExportError
from gqa_export.quantized import kv_codes

pytestmark = pytest.mark.kernels
SHAPES = [
    ("decode", ((40, 1), (0, 1), (17, 0)), 1),
    ("decode", ((15, 3), (31, 2)), 3),
    ("prefill", ((0, 17), (30, 9)), 17),
    ("prefill", ((3, 20),), 20),
]
FACTORS = {
    "shape": SHAPES, "cache": ["int8", "fp8"], "kv_heads": [1, 2], "group": [1, 3], "head": [8, 40],
    "value_head": ["same", 24], "dtype": ["fp16", "bf16", "fp32"], "window": [0, 7], "softcap": [0.0, 5.0],
    "sinks": [False, True], "rotary": [0, "half", "interleaved"],
}


def case_of(row: dict) -> Case:
    _, lengths, steps = row["shape"]
    head = row["head"]
    return Case(lengths, steps, capacity=max(past + new for past, new in lengths) + 3,
                heads=row["kv_heads"] * row["group"], kv_heads=row["kv_heads"], head=head,
                value_head=head if row["value_head"] == "same" else row["value_head"], dtype=row["dtype"],
                window=row["window"], softcap=row["softcap"], sinks=row["sinks"],
                rotary=head // 2 if row["rotary"] else 0,
                interleaved=row["rotary"] == "interleaved")


@pytest.mark.parametrize("row", pairwise(FACTORS), ids=lambda row: "-".join(map(str, row.values())))
def test_codes_are_the_rule_s_and_the_output_is_theirs(row: dict) -> None:
    problem = coded(make(case_of(row)), row["cache"])
    before = problem.past_key.clone(), problem.past_value.clone()
    ahead = row["softcap"] == 0 and row["dtype"] != "fp32"
    output = run_kernels(problem, row["shape"][0], ahead=ahead).double()
    assert_cache_holds_new_codes(problem, before)
    expected, allowed = truth_of_codes(problem)
    assert torch.equal(output.isnan(), expected.isnan())
    assert (output - expected).abs().max() <= allowed


@pytest.mark.parametrize("cache", ["int8", "fp8"])
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_key_or_value_that_is_not_finite_makes_nan_rows_from_its_token_on(kind: str, cache: str) -> None:
    """Sequence 0: a NaN in a key of head 1 at token 3. Sequence 1: an infinity in a value of head 0 at token 17, in the
    second tile of new tokens. Padding of sequence 2 is NaN and is no fault."""
    plain = make(Case(((5, 20), (0, 20), (9, 4)), 20, capacity=40, heads=4, kv_heads=2, dtype="fp16"))
    plain.key.view(3, 20, 2, 16)[0, 3, 1, 7] = torch.nan
    plain.value.view(3, 20, 2, 16)[1, 17, 0, 2] = -torch.inf
    problem = coded(plain, cache)
    output = run_kernels(problem, kind).view(3, 20, 4, 16)
    assert output[0, :3].isfinite().all()
    assert output[0, 3:, :2].isfinite().all()
    assert output[0, 3:, 2:].isnan().all()
    assert output[1, :17].isfinite().all()
    assert output[1, 17:, 2:].isfinite().all()
    assert output[1, 17:, :2].isnan().all()
    assert output[2].isfinite().all()
    assert torch.equal(truth(coded(plain, cache))[0].view_as(output).isnan(), output.isnan())


def test_fp8_keeps_a_nan_for_later_calls_and_int8_does_not() -> None:
    """A NaN at token 2 of the past: int8 has no code that says it."""
    for cache, kept in (("int8", False), ("fp8", True)):
        plain = make(Case(((2, 1),), 1, capacity=8, dtype="fp16"))
        plain.key[0, 0, 3] = torch.nan
        problem = coded(plain, cache)
        assert run_kernels(problem, "decode").isnan().any()
        later = replace(problem, query=plain.query, key=torch.ones_like(plain.key), value=torch.ones_like(plain.value),
                        past_lengths=torch.tensor([3], dtype=torch.int32), guards=[])
        assert run_kernels(later, "decode").isnan().any() == kept


def test_numbers_become_the_codes_of_the_exporter_s_rule() -> None:
    """Beyond both ends, and ties on either side of zero, which go to the even code."""
    numbers = np.concatenate([np.array([-1e9, -128.5, -128, -127.5, -2.5, -1.5, -0.5, 0, 0.5, 1.5, 126.5, 127.5, 1e9]),
                              np.random.default_rng(5).normal(0, 60, 500)]).astype(np.float32)
    for scale in (1.0, 0.37):
        ours = codes.encode(torch.from_numpy(numbers * np.float32(scale)), scale, torch.int8).numpy()
        assert (ours == kv_codes.encode(numbers * np.float32(scale), scale, 8)).all()
    assert codes.encode(torch.tensor([-1e9, 0.5, 1.5, 2.5]), 1.0, torch.int8).tolist() == [-128, 0, 2, 2]


def test_fp8_is_rounded_once_to_nearest_with_ties_to_even_and_saturates() -> None:
    """Every code, every middle between two neighbours, and a hair beside it: fp64 has them all exactly."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()].unique()
    assert len(every) == 253  # +-0 once
    assert torch.equal(codes.encode(every, 1.0, torch.float8_e4m3fn).double(), every)
    middles = (every[1:] + every[:-1]) / 2
    for nudge, wanted in ((1e-12, every[1:]), (-1e-12, every[:-1])):
        assert torch.equal(codes.encode(middles + nudge, 1.0, torch.float8_e4m3fn).double(), wanted)
    tied = codes.encode(middles, 1.0, torch.float8_e4m3fn)
    assert (tied.view(torch.uint8) % 2 == 0).all()
    ends = codes.encode(torch.tensor([1e9, -torch.inf, torch.nan]), 1.0, torch.float8_e4m3fn).double()
    assert ends[:2].tolist() == [448, -448]
    assert ends[2].isnan()


@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_the_entry_takes_caches_of_codes_by_either_backend(cache: str) -> None:
    plain = make(Case(((30, 3), (7, 1)), 3, capacity=40, rotary=8))
    outputs, caches = [], []
    for backend in (None, "reference"):
        problem = coded(plain, cache)
        key_scale, value_scale = problem.scales
        output, past_key, _ = grouped_query_attention(
            *problem.tensors()[:6], new_lengths=problem.new_lengths, cos=problem.cos, sin=problem.sin,
            key_scale=key_scale, value_scale=value_scale, backend=backend, **plain.case.attributes)
        outputs.append(output)
        caches.append(past_key[0, :, :33].float())
    torch.testing.assert_close(*outputs, atol=2e-6, rtol=0)
    assert torch.equal(*caches)


def test_a_cache_that_is_no_pair_of_codes_with_scales_is_refused() -> None:
    problem = coded(make(Case(((3, 1),), 1, capacity=8)), "int8")
    attributes = problem.case.attributes
    for change, message in (
            ({}, "their scales are missing"),
            ({"key_scale": 0.1}, "value_scale: is absent"),
            ({"key_scale": 0.1, "value_scale": -1.0}, "is not a positive number"),
            ({"key_scale": float("nan"), "value_scale": 1.0}, "is not a positive number")):
        with pytest.raises(GqaExportError, match=message) as caught:
            grouped_query_attention(*problem.tensors()[:6], **attributes, **change)
        assert caught.value.code == "E-RUN-ARGUMENT"
    mixed = replace(problem, past_value=problem.past_value.float())
    with pytest.raises(GqaExportError, match=r"past_value: dtype torch\.float32, but key_scale"):
        grouped_query_attention(*mixed.tensors()[:6], **attributes, key_scale=1.0, value_scale=1.0)
    with pytest.raises(GqaExportError, match="their scales are missing"):
        attend(*problem.tensors()[:6], **attributes)


@pytest.mark.parametrize("fault", ["scales exchanged", "clipped at -127"])
def test_the_comparison_sees_exchanged_scales_and_a_narrower_end(fault: str) -> None:
    """What the tests above would let pass, they would not show."""
    plain = make(Case(((20, 3),), 3, capacity=30))
    plain.key.mul_(2)
    problem = coded(plain, "int8")
    before = problem.past_key.clone(), problem.past_value.clone()
    if fault == "scales exchanged":
        run_kernels(replace(problem, scales=problem.scales[::-1]), "decode")
    else:
        run_kernels(problem, "decode")
        assert_cache_holds_new_codes(problem, before)
        least = problem.past_key[:, :, 20:23] == -128
        assert least.any()
        problem.past_key[:, :, 20:23][least] = -127
    with pytest.raises(AssertionError):
        assert_cache_holds_new_codes(problem, before)
