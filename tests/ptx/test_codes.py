"""The compiled kernels over caches of codes, on the interpreter: the codes that they write, and what they make of them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gqa_plugins.grouped_attention.cubin import Variant, compile_to_ptx

from gqa_export.errors import GqaExportError

from .attention import Case, Run, attend, check, coded, make
from .numbers_of_ptx import from_fp8, to_fp8

pytestmark = pytest.mark.kernels
CODES: dict[str, Run] = {
    "decode, 8.0, int8, three lengths, one empty":
        Run(Case(((150, 1), (0, 1), (63, 0)), 1, 200, 8, 2, 64, 64, "bf16"), 80, "decode", 3, cache="int8"),
    "decode, 9.0, int8, three steps, rotated keys, sinks, window":
        Run(Case(((98, 3), (60, 2)), 3, 110, 8, 2, 128, 128, "bf16", window=65, sinks=True, rotary=64), 90, "decode",
            cache="int8"),
    "decode, 8.0, int8, fp32, odd head sizes, soft cap":
        Run(Case(((35, 2), (15, 1)), 2, 37, 3, 1, 7, 5, "fp32", softcap=20.0), 80, "decode", cache="int8"),
    "prefill, 8.0, int8, two tiles of new tokens, neighbours rotated":
        Run(Case(((40, 20), (0, 3)), 20, 70, 4, 2, 64, 64, "fp16", rotary=32, interleaved=True), 80, "prefill",
            cache="int8"),
    "prefill, 9.0, int8, works ahead, head size 128":
        Run(Case(((150, 33), (0, 33)), 33, 200, 4, 1, 128, 128, "bf16"), 90, "prefill", cache="int8"),
    "prefill, 9.0, int8, in turn, soft cap and sinks":
        Run(Case(((113, 27),), 27, 140, 5, 1, 80, 80, "fp16", softcap=20.0, sinks=True), 90, "prefill", cache="int8"),
    "decode, 8.9, fp8, two steps":
        Run(Case(((150, 2), (63, 1)), 2, 180, 4, 1, 128, 128, "bf16"), 89, "decode", cache="fp8"),
    "prefill, 8.9, fp8, part of a head rotated":
        Run(Case(((60, 20),), 20, 100, 4, 2, 64, 64, "fp16", rotary=16), 89, "prefill", cache="fp8"),
    "decode, 12.0, fp8":
        Run(Case(((96, 1), (95, 1)), 1, 97, 8, 1, 128, 128, "bf16"), 120, "decode", cache="fp8"),
    "prefill, 9.0, fp8":
        Run(Case(((40, 24),), 24, 80, 4, 2, 64, 64, "bf16"), 90, "prefill", cache="fp8"),
}


@pytest.mark.parametrize("name", list(CODES))
def test_compiled_kernels_write_the_rule_s_codes_and_read_them_as_close_to_fp64_as_eager(name: str) -> None:
    result = check(CODES[name])
    assert result.ok, f"error {result.error:.3g}, allowed {result.allowed:.3g}"


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_value_that_is_not_finite_makes_nan_rows_from_its_token_on(kind: str) -> None:
    case = Case(((9, 18),), 18, 30, 2, 2, 64, 64, "fp16")
    plain = make(case)
    plain.value.view(1, 18, 2, 64)[0, 17, 1, 5] = torch.inf
    output = attend(Run(case, 80, kind, cache="int8"), coded(plain, "int8")).view(18, 2, 64)
    assert output[:17].isfinite().all()
    assert output[17, 0].isfinite().all()
    assert output[17, 1].isnan().all()


def test_kernels_over_numbers_hold_no_code_for_codes() -> None:
    """No quotient of a scale and no argument for one: their PTX is what it was before there were codes."""
    plain, codes = (compile_to_ptx(Variant("append", "bf16", 4, 64, 64, cache=cache), 80)[1] for cache in ("", "int8"))
    assert "div.rn" in codes
    assert "div.rn" not in plain
    assert codes.count(".param .f32 append_kernel") - plain.count(".param .f32 append_kernel") == 2


def test_fp8_below_8_9_is_refused_by_name() -> None:
    with pytest.raises(GqaExportError, match=r"fp8 codes needs compute capability 8\.9, and 8\.6") as caught:
        compile_to_ptx(Variant("decode", "bf16", 4, 64, 64, 4, cache="fp8"), 86)
    assert caught.value.code == "E-ENGINE-KERNEL-FP8"


def test_the_interpreter_s_fp8_is_pytorch_s() -> None:
    """All codes, all middles between two, and random numbers up to the largest."""
    codes = np.arange(256, dtype=np.uint8)
    theirs = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(from_fp8(codes), theirs, equal_nan=True)
    ordered = np.unique(theirs[np.isfinite(theirs)])
    numbers = np.concatenate([ordered, (ordered[1:] + ordered[:-1]) / 2,
                              np.random.default_rng(3).normal(0, 50, 4000)]).astype(np.float32).clip(-448, 448)
    wanted = torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    ours = to_fp8(numbers)
    assert np.array_equal(from_fp8(ours), from_fp8(wanted))
    assert to_fp8(np.array([1e9, -1e9, np.nan, np.inf], np.float32)).tolist() == [126, 254, 127, 126]
