"""How much difference is rounding: a bound derived from the same-dtype baseline, floored and capped by the number
format.

The same-dtype baseline of an output is the error that PyTorch itself makes in the bundle's number format: max |eager
in that format - eager in fp64| over the same case. A right bundle is another draw of the same rounding errors, in
another order of summation, so its error is a small multiple of the baseline; that of a wrong mask, scale or rotation
is not.

FACTOR 8: on tiny Llama (`ort`, `onnx`, `portable`), Mistral, Gemma 2 and GPT-OSS (`ort`), 32 steps, the ratio of the
bundle's error to the baseline was at most 3.2; 8 leaves a factor of two for other families' and machines' kernels.
FLOOR_ULPS: where eager happens to be nearly exact (few rows, short sums) the ratio has no
meaning; an fp32 sum of some hundred products, normalised twice per layer, may move by tens of units in the last
place of the largest value; fp16 and bf16 kernels sum in fp32 and round what they store. CAP_ULPS and CAP_PART bound
what a baseline can excuse: a checkpoint whose own low precision is that far off cannot be told from a broken
bundle, and is reported as different rather than passed.

ROUNDED_FACTOR: activations that are rounded to int8 are another matter. A value near the middle between two codes goes
to one or the other for a difference of 1e-7, so that equally right programs differ by as much as the rounding itself
does, and a model with a few very large activations amplifies it: on SmolLM2, 17 special tokens as a prompt, PyTorch by
one rule in fp32 and in fp64 is off by 3.9 and 10.1 of 36. That the graph is right is told at level 0, within the
ordinary bounds. The bundle as shipped may then be as far off as PyTorch is by the same rule (largest of its draws),
times ROUNDED_FACTOR; the largest value bounds it.

Where rounding moves PyTorch by as much as the largest value, as it does in tiny random models whose routers choose
other experts then (dbrx: 1.3 times), a right bundle is as far off, and no bound beside the reference tells it from a
wrong one. What PyTorch computes by the same rule does: the bundle may be within CAP_PART of it (`by_rule`). On dbrx it
was within 0.03, or equal to six digits. Where one large activation decides which code others get, not even that holds:
SmolLM2 with FP8 inputs, the prompt of special tokens, values of layer 14: PyTorch is off by 2.8 of 3.2, the bundle by
3.2, and the two by a third of that from one another, because FP8's codes lie 6 % apart. Such keys and values are held
to their range (`in_range`), and what comes of them, the logits, is judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
FACTOR = 8.0
FLOOR_ULPS = {"float32": 32.0, "float16": 4.0, "bfloat16": 4.0}
CAP_ULPS = 1024.0
CAP_PART = 0.125
ROUNDED_FACTOR = 3.0
ASSUMED_ULPS = 48.0
"""stands in for the baseline, in units in the last place of the largest value, where fp64 does not fit in memory"""


@dataclass(frozen=True)
class Tolerance:
    """`bound` is what |got - expected| may reach; `basis` names what decided it: "baseline", "floor", "cap", or
    "activations": what rounding activations does to PyTorch too, "rule": expected is PyTorch by the same rule, or
    "range": rounding moves PyTorch by all there is, and two values in the range may be as far apart."""

    bound: float
    baseline: float
    basis: str


def tolerance(baseline: float | None, scale: float, dtype: str, rounded: bool = False) -> Tolerance:
    """The bound for one output.

    Args:
        baseline: the same-dtype baseline of that output; None: it could not be measured, and is assumed.
        scale: the largest value of the reference.
        dtype: number format that was run: "float32", "float16" or "bfloat16".
        rounded: activations were rounded to int8, in the baseline too: units of `dtype` do not bound its error then.
    """
    ulp = EPSILON[dtype] * scale
    if baseline is None:
        baseline = ASSUMED_ULPS * ulp
    wanted, floor = FACTOR * baseline, FLOOR_ULPS[dtype] * ulp
    cap = _cap(scale, dtype, rounded)
    excused = min(ROUNDED_FACTOR * baseline, scale) if rounded and math.isfinite(baseline) else 0.0
    if excused > cap:
        return Tolerance(excused, baseline, "activations")
    if not wanted <= cap:
        return Tolerance(cap, baseline, "cap")
    return Tolerance(max(wanted, floor), baseline, "baseline" if wanted > floor else "floor")


def most(scale: float, dtype: str, rounded: bool = False) -> float:
    """The largest bound that any baseline gives: what is past it is wrong whatever PyTorch does. As of `tolerance`."""
    return scale if rounded else max(_cap(scale, dtype, rounded), FLOOR_ULPS[dtype] * EPSILON[dtype] * scale)


def _cap(scale: float, dtype: str, rounded: bool) -> float:
    return CAP_PART * scale if rounded else min(CAP_ULPS * EPSILON[dtype] * scale, CAP_PART * scale)


def blind(limit: Tolerance, scale: float) -> bool:
    """Whether rounding moves PyTorch by as much as the largest value `scale`: a bound beside the reference tells
    nothing then."""
    return limit.basis in ("activations", "rule") and limit.baseline >= scale


def by_rule(baseline: float, scale: float) -> Tolerance:
    """The bound for one output beside PyTorch that rounds activations by the same rule. baseline, scale: as of
    `tolerance`."""
    return Tolerance(CAP_PART * scale, baseline, "rule")


def in_range(baseline: float, scale: float) -> Tolerance:
    """The bound for one output that rounding moves by as much as the largest value: as far as PyTorch's error, times
    ROUNDED_FACTOR, and as two values of its range can be apart. baseline, scale: as of `tolerance`."""
    return Tolerance(min(ROUNDED_FACTOR * baseline, 2 * scale), baseline, "range")
