"""A case in which PyTorch's own rounding is past every bound: the report says that no export could pass."""

from __future__ import annotations

from gqa_export.compare.case_verdict import CaseVerdict, KindVerdict, Location
from gqa_export.compare.tolerance import tolerance
from gqa_export.validation.parts import beyond_bounds


def case_of(baseline: float, found: float, dtype: str = "float32") -> CaseVerdict:
    """A case whose logits are 11 at most."""
    limit = tolerance(baseline, 11.0, dtype)
    first = Location("ragged", 0, "prefill", "logits", {}, 1.0, 1.0 + found, found, limit.bound) \
        if found > limit.bound else None
    kind = KindVerdict("logits", "logits", found, limit.bound, baseline, limit.basis, first)
    return CaseVerdict("ragged", "", 1, (3,), 1, False, (kind,), 1, 1, (), None, None, 0.0)


def test_a_model_whose_own_fp32_is_past_the_cap_is_named_with_both_numbers() -> None:
    """As an MXFP8 checkpoint with weights of 200 does: fp32 is off by 4.45e-3, and 1,024 units of 11 are 1.34e-3."""
    [line] = beyond_bounds((case_of(4.45e-3, 5e-3),), "float32")
    assert line.startswith("ragged: PyTorch in float32 is itself off by 0.0044 in logits")
    assert "0.0013 that any bound allows" in line
    assert "no export in this number format could pass" in line
    assert "--as fp32" not in line
    [half] = beyond_bounds((case_of(2.0, 3.0, "float16"),), "float16")
    assert half.endswith("(--as fp32 compares the graph in fp32)")


def test_nothing_is_said_where_pytorch_is_within_the_bound_or_the_case_passes() -> None:
    assert beyond_bounds((case_of(1e-3, 5e-3), case_of(1e-5, 5e-3), case_of(4.45e-3, 1e-3)), "float32") == []
