"""Runs the cases of a plan: the fp64 reference, the same-dtype baseline and the bundle walk in step, through
Polygraphy's Comparator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from ..compare.case_driver import BUNDLE, EAGER, REFERENCE, CaseDriver, CaseLog, CodeShare
from ..compare.case_verdict import SHIPPED
from ..compare.cases import Case, Plan
from ..compare.judge import doubtful, judge
from ..environment.heap import give_back
from ..progress import Progress
from ..runtime.session import Step
from .sessions import Sessions

DEAR = 4.0
"""cost of a feed (`Case.costs`) after which freed memory goes back: the next one's blocks have other sizes"""
REDRAWS = (1, 2, 3)
"""seeds: a case that fails is held against the largest of four draws of PyTorch's rounding errors (`doubtful`)"""


def run_cases(sessions: Sessions, plan: Plan, *, last_only: bool = False, report: Progress | None = None,
              dtype: str = "float32", part: str = "",
              notes: list[str] | None = None) -> list[CaseLog]:
    """Run every case of a plan through the Comparator and return what was measured. dtype: the format that is run;
    part: see `CaseVerdict`; notes: takes a line for every case whose baseline was measured again."""
    cases = [case for case in plan.cases
             if not case.garbage or sessions.fill_garbage is not None or case.entry == "ring N"]
    total, done = sum(sum(case.costs) for case in cases), 0.0
    logs: list[CaseLog] = []
    failed = False  # for good: the verdict is known then, and draws cost three runs of PyTorch each
    for case in cases:
        costs = iter(case.costs)

        def tick(name: str = case.name, costs: Iterator[float] = costs) -> None:
            nonlocal done
            cost = next(costs, 0.0)
            done += cost
            if cost > DEAR:
                give_back()
            if report is not None:
                report(f"comparing: {name}", done, total)

        if case.garbage and sessions.fill_garbage is None:
            case = replace(case, garbage=())  # the seam of the ring is passed all the same
        if sessions.fill_garbage is not None:
            sessions.fill_garbage(case.garbage)
        with limited(sessions, case.capacity), masked(sessions.bundle, case.whole_row_mask):
            log = run_case(sessions, case, last_only, tick, rounded=part == SHIPPED and sessions.by_rule)
            if sessions.eager is not None and not failed and doubtful(log, dtype, part):
                measure_again(sessions, log, last_only)
                (notes if notes is not None else []).append(
                    f"case {case.name}: past its bounds by no more than PyTorch's own rounding may be; that was "
                    f"measured {1 + len(REDRAWS)} times")
            failed = failed or (sessions.eager is not None and not judge(log, dtype, part).passed)
            logs.append(log)
    return logs


def measure_again(sessions: Sessions, log: CaseLog, last_only: bool) -> None:
    """Let the baselines of a case be the largest of several draws of PyTorch's rounding errors."""
    eager: Any = sessions.eager
    for seed in REDRAWS:
        with eager.redrawn(seed):
            drawn = run_case(sessions, log.case, last_only, lambda: None).baseline or {}
        log.baseline = {name: max(known, drawn.get(name, 0.0)) for name, known in (log.baseline or {}).items()}


@contextmanager
def limited(sessions: Sessions, capacity: int) -> Iterator[None]:
    """Inside, no cache holds more than `capacity` tokens (0: as they are)."""
    present: list[Any] = [one for one in (sessions.reference, sessions.eager, sessions.bundle) if one is not None]
    before = [session.capacity for session in present]
    try:
        for session in present if capacity else ():
            session.capacity = capacity
        yield
    finally:
        for session, whole in zip(present, before):
            session.capacity = whole


@contextmanager
def masked(bundle: Any, whole_row: bool) -> Iterator[None]:
    """Inside, the bundle's session sends masks that have all ones of a row first, if `whole_row`."""
    if whole_row:
        bundle.whole_row_masks = True
    try:
        yield
    finally:
        if whole_row:
            bundle.whole_row_masks = False


def count_codes(share: CodeShare, reference: Any, eager: Any, written: Step, counts: np.ndarray) -> None:
    """Add the codes of one step. written: keys and values [B, K, S, D] of the bundle, one array for each layer. counts
    [B]: new tokens. Both of PyTorch's sessions have just followed them."""
    for row, count in enumerate(counts.tolist()):
        if not count:
            continue
        for number, (exact, own) in enumerate(zip(reference.quantized_layers(row), eager.quantized_layers(row))):
            key, value = (side[number][row, :, :count] for side in (written.keys or (), written.values or ()))
            apart, total = exact.apart((key, value))
            share.apart, share.total = share.apart + apart, share.total + total
            share.own += exact.apart(own.own())[0]


def run_case(sessions: Sessions, case: Case, last_only: bool, tick: Callable[[], None],
             rounded: bool = False) -> CaseLog:
    """Run one case. Polygraphy streams: a step's arrays are dropped before the next one runs. rounded: see
    `CaseDriver`."""
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    from .session_runner import SessionRunner

    began = time.perf_counter()
    shared: dict[str, Any] = {"last_only": last_only, "alike": sessions.alike, "windows": sessions.windows,
                              "seen": bool(case.garbage), "hidden": sessions.hidden}
    bundle = SessionRunner(sessions.bundle, BUNDLE, single=case.single, **shared)
    others, leader = [bundle], bundle if sessions.follow else None
    if sessions.eager is not None:
        others.insert(0, SessionRunner(sessions.eager, EAGER, free=False, follows=leader, **shared))
    pairs = [(0, 1)] if len(others) == 1 else [(0, 1), (1, 2), (0, 2)]
    first = SessionRunner(sessions.reference, REFERENCE, follows=leader,
                          beside=others if sessions.beside and leader is None else (), **shared)
    runners = [first, *others]
    if leader is not None:  # called first: the others look at what it wrote
        runners = [runners.pop(), *runners]
        pairs = [((one + 1) % len(runners), (two + 1) % len(runners)) for one, two in pairs]
    def after() -> None:
        if counted is not None and sessions.eager is not None:
            count_codes(counted, sessions.reference, sessions.eager, bundle.written, driver.new_lengths)
        tick()

    driver = CaseDriver(case, np.concatenate(case.prompts), after, rounded)
    counted = driver.log.codes = CodeShare() if sessions.count_codes and leader is not None else None
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        stream = Comparator.run(runners, data_loader=driver.feeds(), streaming=True)
        Comparator.compare_accuracy(stream, comparisons=pairs, compare_func=driver.compare)
    driver.log.seconds = time.perf_counter() - began
    return driver.log
