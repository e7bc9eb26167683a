"""What a case leaves behind for a report: the error of every output and of every step, and the surroundings of the
worst element. Small: some numbers per layer and per step, no arrays.

Errors are told as a share of what is allowed: 1 is the bound, infinite is NaN or infinity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .metrics import Difference

REACH_TOKENS = 2
REACH_FEATURES = 3


@dataclass(frozen=True)
class OutputError:
    """One output over all steps: its largest error, what is allowed, and the step where it was."""

    output: str
    max_abs: float
    bound: float
    step: int

    @property
    def share(self) -> float:
        """The error as a share of what is allowed."""
        return share(self.max_abs, self.bound)


@dataclass(frozen=True)
class StepError:
    """One step: the largest share of what is allowed, by kind of output; max |logit difference|."""

    step: int
    phase: str
    shares: dict[str, float]
    logits: float


@dataclass(frozen=True)
class Surroundings:
    """Both sides around the worst element of an output, rows are tokens, columns features (or ids).

    axes: the fixed axes (batch, head); tokens: absolute positions of the rows; first_feature: of the columns.
    centre: (row, column) of the worst element."""

    output: str
    axes: dict[str, int]
    tokens: tuple[int, ...]
    first_feature: int
    centre: tuple[int, int]
    expected: tuple[tuple[float, ...], ...]
    got: tuple[tuple[float, ...], ...]


def share(max_abs: float, bound: float) -> float:
    """`max_abs` as a share of `bound`; infinite where nothing was allowed and there is something."""
    if math.isnan(max_abs):
        return math.inf
    return max_abs / bound if bound else (math.inf if max_abs > 0 else 0.0)


def surroundings(output: str, expected: np.ndarray, got: np.ndarray, found: Difference,
                 starts: tuple[int, ...]) -> Surroundings:
    """Around the largest gap of `found`, which compared expected and got: [B, S, V] or [B, K, S, D].

    starts: absolute position of the first token, per row of the batch."""
    row, token = (int(i) for i in np.unravel_index(int(np.argmax(found.gap)), found.gap.shape))
    inner = [int(i) for i in np.unravel_index(int(found.place[row, token]), found.shape)]
    fixed, feature = ({"batch": row}, inner[0]) if len(inner) == 1 else ({"batch": row, "head": inner[0]}, inner[1])
    sides = [array[row] if len(inner) == 1 else array[row, inner[0]] for array in (expected, got)]
    tokens = range(max(0, token - REACH_TOKENS), min(sides[0].shape[0], token + REACH_TOKENS + 1))
    left = max(0, feature - REACH_FEATURES)
    blocks = [side[tokens.start: tokens.stop, left: feature + REACH_FEATURES + 1].astype(np.float64).tolist()
              for side in sides]
    return Surroundings(output, fixed, tuple(starts[row] + t for t in tokens), left, (token - tokens.start,
                        feature - left), *(tuple(map(tuple, block)) for block in blocks))


def output_errors(found: Iterable[tuple[str, str, int, float]], bounds: Mapping[str, float]) -> tuple[OutputError, ...]:
    """Per output its worst step, in the order of first appearance. found: (output, its quantity, step, max_abs)."""
    worst: dict[str, OutputError] = {}
    for output, quantity, step, max_abs in found:
        if output not in worst or not max_abs <= worst[output].max_abs:
            worst[output] = OutputError(output, max_abs, bounds[quantity], step)
    return tuple(worst.values())


def step_errors(found: Iterable[tuple[int, str, str, float, float]]) -> tuple[StepError, ...]:
    """Per step the worst share of every kind. found: (step, phase, kind, max_abs, bound); the whole cache at the end
    belongs to no step."""
    steps: dict[int, StepError] = {}
    for step, phase, kind, max_abs, bound in found:
        if phase == "cache":
            continue
        before = steps.get(step, StepError(step, phase, {}, 0.0))
        shares = {**before.shares, kind: max(before.shares.get(kind, 0.0), share(max_abs, bound))}
        steps[step] = StepError(step, phase, shares, max_abs if kind == "logits" else before.logits)
    return tuple(steps.values())
