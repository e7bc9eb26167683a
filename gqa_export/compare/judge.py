"""From what was measured to a judgement: every output of every step is held against the bound of its quantity."""

from __future__ import annotations

import math

from ..graph_io import HIDDEN_STATES
from .case_driver import CaseLog, Choice, Measured, quantity
from .case_verdict import SHIPPED, CaseVerdict, KindVerdict, Location
from .code_share import CODES, judge_codes
from .error_trace import output_errors, step_errors
from .tolerance import Tolerance, blind, by_rule, in_range, most, tolerance

INNER = ("keys", "values", "states")
KINDS = ("keys", "values", "states", "hidden states", "logits", "cache")


def doubtful(log: CaseLog, dtype: str, part: str = "") -> bool:
    """Whether a case failed, and a lucky baseline may be why: everything is finite, and no output is so far off that
    no baseline allows it.

    A baseline is one draw of PyTorch's rounding errors. Where inputs amplify these, all of a case's errors follow one
    number that was rounded early, and a draw near its middle makes all of them small: on SmolLM2, prompt of special
    tokens, keys of layer 12, one draw gave 1.2e-5 and the largest of three others 4.0e-4.

    Arguments as of `judge`.
    """
    verdict, rounded = judge(log, dtype, part), part == SHIPPED
    if verdict.passed or any(kind.kind == CODES and not kind.passed for kind in verdict.kinds):  # a share is no draw
        return False
    scales, ruled = _scales(log), {(one.step, one.output): one.difference.max_abs for one in log.by_rule}

    def excusable(one: Measured) -> bool:
        scale, found = scales[quantity(one.output)], one.difference.max_abs
        inner = ruled and _kind(quantity(one.output)) in INNER
        limit = in_range(math.inf, scale).bound if inner else most(scale, dtype, rounded)
        by_the_rule = ruled.get((one.step, one.output), math.inf)
        return not one.difference.nonfinite and (found <= limit or by_the_rule <= by_rule(0.0, scale).bound)

    parted = verdict.parted is None or verdict.parted.margin <= most(scales["logits"], dtype, rounded)
    return parted and all(map(excusable, log.bundle))


def judge(log: CaseLog, dtype: str, part: str = "") -> CaseVerdict:
    """Hold every measurement of a case against the bound of its output, in the number format `dtype`. part: see
    `CaseVerdict`; what is judged as shipped has a baseline that rounds its activations, whatever the format."""
    rounded = part == SHIPPED
    name = f"shipped {log.case.name}" if rounded else log.case.name
    scales = _scales(log)
    bounds = {output: tolerance(None if log.baseline is None else log.baseline[output], scale, dtype, rounded)
              for output, scale in scales.items()}
    bounds, measured = _by_rule(log, bounds, scales) if log.by_rule else (bounds, log.bundle)
    kinds = tuple(_judge_kind(kind, [one for one in measured if _kind(one.output) == kind], bounds, log, name)
                  for kind in KINDS if any(_kind(one.output) == kind for one in measured))
    if log.codes is not None and log.codes.total:
        kinds = (*kinds, judge_codes(log.codes, name, log.case.feeds - 1))
    limits = {output: limit.bound for output, limit in bounds.items()}
    outputs = output_errors(((label(one.output), quantity(one.output), one.step, one.difference.max_abs)
                             for one in measured), limits)
    trail = step_errors((one.step, one.phase, _kind(one.output), one.difference.max_abs,
                         limits[quantity(one.output)]) for one in measured)
    limit, moved = bounds["logits"].bound, blind(bounds["logits"], scales["logits"])
    ties = tuple(choice for choice in log.choices if choice.margin < limit)
    real = [choice for choice in log.choices if not choice.margin < limit and not (
        moved and log.best_by_rule.get((choice.step, choice.row)) == choice.got)]
    case = log.case
    return CaseVerdict(name, case.purpose, case.batch, tuple(len(p) for p in case.prompts), len(case.counts),
                       case.free, kinds, log.rows, log.agreed, ties, real[0] if case.free and real else None,
                       log.eager_logits, log.seconds, outputs, trail, log.tally.metrics(_prefix(log, real)),
                       case.entry, part,
                       tuple(label(output) for output, limit in bounds.items() if limit.basis == "range"))


def _scales(log: CaseLog) -> dict[str, float]:
    """The largest value of each output in the reference."""
    found: dict[str, float] = {}
    for one in log.bundle:
        found[quantity(one.output)] = max(found.get(quantity(one.output), 0.0), one.difference.scale)
    return found


def _by_rule(log: CaseLog, bounds: dict[str, Tolerance],
             scales: dict[str, float]) -> tuple[dict[str, Tolerance], list[Measured]]:
    """What is judged of a bundle as shipped: an output that is past its bound where rounding moves PyTorch by as much
    as the largest value, and that agrees with PyTorch by the same rule, is judged by that. Keys, values and states that
    do not may be anything in their range, if logits, which come of them, are judged by a bound that tells something."""
    followed, ruled_by = {}, {(one.step, one.output): one for one in log.by_rule}
    past = {output: limit for output, limit in bounds.items()
            if blind(limit, scales[output]) and _farthest(log.bundle, output) > limit.bound}
    for output, limit in past.items():
        rule = by_rule(limit.baseline, scales[output])
        if _farthest(log.by_rule, output) <= rule.bound:
            followed[output] = rule
    judged = {**bounds, **followed}
    if not blind(bounds["logits"], scales["logits"]) or "logits" in followed:
        judged |= {output: in_range(limit.baseline, scales[output]) for output, limit in past.items()
                   if output not in followed and _kind(output) in INNER}
    return judged, [ruled_by[one.step, one.output] if quantity(one.output) in followed else one for one in log.bundle]


def _farthest(side: list[Measured], output: str) -> float:
    return max((one.difference.max_abs for one in side if quantity(one.output) == output), default=math.inf)


def _prefix(log: CaseLog, real: list[Choice]) -> int:
    """Decode steps of a free run until the sides parted for real."""
    if not log.case.free:
        return -1
    before = log.case.feeds - len(log.case.counts)
    return min((choice.step for choice in real), default=log.case.feeds - 1) - before + 1


def _judge_kind(kind: str, measured: list[Measured], bounds: dict[str, Tolerance], log: CaseLog,
                case: str) -> KindVerdict:
    def excess(one: Measured) -> float:
        bound = bounds[quantity(one.output)].bound
        return one.difference.max_abs / bound if bound else float(one.difference.max_abs > 0)

    worst = max(measured, key=excess)
    limit = bounds[quantity(worst.output)]
    found = (_locate(one, bounds[quantity(one.output)].bound, case) for one in measured)
    where = next((location for location in found if location is not None), None)
    return KindVerdict(kind, label(worst.output), worst.difference.max_abs, limit.bound, limit.baseline,
                       limit.basis, where, None if limit.basis == "rule" else log.worst.get(worst.output))


def _locate(one: Measured, bound: float, case: str) -> Location | None:
    element = one.difference.first_over(bound)
    if element is None:
        return None
    axes = element.axes | {"token": element.axes["token"] + one.tokens[element.axes["batch"]]}
    return Location(case, one.step, one.phase, label(one.output), axes, element.expected, element.got, element.gap,
                    bound, one.difference.nonfinite)


def _kind(output: str) -> str:
    if output == "logits":
        return "logits"
    if output == HIDDEN_STATES:
        return "hidden states"
    if "_state" in output:
        return "states"
    return "cache" if output.startswith("cache.") else output.rsplit(".", 1)[1] + "s"


def label(output: str) -> str:
    """`layer.7.key` as "layer 7 key", `cache.7.key` as "whole cache of layer 7 key"."""
    if output == HIDDEN_STATES:
        return "hidden states"
    return output.replace("cache.", "whole cache of layer.", 1).replace(".", " ")
