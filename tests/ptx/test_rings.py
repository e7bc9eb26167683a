"""The compiled kernels over rings, on the interpreter, against the fp64 truth over caches that keep every token."""

from __future__ import annotations

import pytest
from gqa_plugins.grouped_attention.cubin import Variant, compile_to_ptx

from .attention import Case, Run, attend, check, problem_of, ring_of
from .cases import RUNS

pytestmark = pytest.mark.kernels
RINGS: dict[str, Run] = {
    "decode, 8.0, the seam within a tile, one sequence not yet around":
        Run(Case(((130, 1), (40, 1), (0, 0)), 1, 140, 4, 2, 64, 64, "bf16", window=70), 80, "decode", 3, slots=81),
    "decode, 9.0, rotated keys, sinks, three steps over the seam":
        Run(Case(((98, 3), (200, 2)), 3, 210, 8, 1, 128, 128, "bf16", window=65, sinks=True, rotary=64), 90, "decode",
            slots=100),
    "decode, 8.9, fp32, as many slots as a window":
        Run(Case(((63, 1), (64, 1), (129, 1)), 1, 140, 3, 1, 40, 24, "fp32", window=64), 89, "decode", slots=64),
    "prefill, 9.0, works ahead across the seam":
        Run(Case(((330, 40),), 40, 380, 2, 1, 128, 128, "bf16", window=220), 90, "prefill", slots=300),
    "prefill, 8.0, soft cap, neighbours rotated, ragged":
        Run(Case(((60, 20), (3, 7), (199, 20)), 20, 230, 4, 2, 64, 64, "fp16", window=50, softcap=20.0, rotary=32,
                 interleaved=True), 80, "prefill", slots=70),
}


@pytest.mark.parametrize("name", list(RINGS))
def test_compiled_kernels_over_rings_are_as_close_to_fp64_as_eager(name: str) -> None:
    result = check(RINGS[name])
    assert result.ok, f"error {result.error:.3g}, allowed {result.allowed:.3g}"


def test_more_new_tokens_than_a_ring_takes_give_nan_rows_in_that_sequence() -> None:
    """18 slots and a window of 16 take 3."""
    run = Run(Case(((50, 3), (50, 4), (7, 1)), 4, 60, 4, 1, 64, 64, "bf16", window=16), 80, "decode", slots=18)
    output = attend(run, ring_of(problem_of(run), run.slots))
    assert output[0, :3].isfinite().all()
    assert output[1].isnan().all()
    assert output[2, :1].isfinite().all()
    assert (output[2, 1:] == 0).all()


def test_kernels_without_a_ring_hold_no_code_for_one() -> None:
    """The remainder by the number of slots is the one that rings alone have."""
    plain, ring = (compile_to_ptx(Variant("append", "bf16", 4, 64, 64, ring=ring), 80)[1] for ring in (False, True))
    assert "rem.s32" in ring
    assert "rem.s32" not in plain
    assert not any(run.slots for run in RUNS.values())
