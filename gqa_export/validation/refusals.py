"""What must be refused, or answered with NaN, never with plausible numbers: judged like a case.

A refusal is a `GqaExportError` raised before anything ran. Left padding cannot reach a session of ours, so it is fed
to the graph itself, where it takes a mask.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..compare.case_verdict import CaseVerdict, KindVerdict, Location
from ..compare.suite import REFUSALS
from ..errors import GqaExportError

REFUSAL = "refusal"


def judge_refusals(session: Any, *, resizable: bool = True) -> CaseVerdict:
    """Feed a session what it must refuse.

    Args:
        session: a `Session`; where it has `left_padded`, the graph is fed left padding too.
        resizable: whether the session's capacity may be set to less.

    Returns:
        A case with one kind for each thing that must be refused.
    """
    began = time.perf_counter()
    checks = [
        ("one token over the capacity", _refuses(session, np.zeros((1, session.capacity + 1), np.int64))),
        ("an id equal to the vocabulary's size", _refuses(session, np.array([[1, session.spec.vocabulary]]))),
        ("a negative id", _refuses(session, np.array([[0, -1]]))),
    ]
    if resizable:
        checks.append(("a token over the capacity, step by step", _refuses_later(session)))
    left_padded: Callable[[], np.ndarray | None] | None = getattr(session, "left_padded", None)
    logits = left_padded() if left_padded is not None else None
    if logits is not None:
        checks.append(("left padding (NaN logits)", bool(np.isnan(logits).all())))
    kinds = tuple(KindVerdict(REFUSAL, label, 0.0 if good else 1.0, 0.0, 0.0, REFUSAL,
                              None if good else Location(REFUSALS, 0, REFUSAL, label, {}, 0.0, 1.0, 1.0, 0.0))
                  for label, good in checks)
    return CaseVerdict(REFUSALS, "what must be refused", 1, (), 0, False, kinds, 0, 0, (), None, None,
                       time.perf_counter() - began, entry=REFUSALS)


def _refuses(session: Any, ids: np.ndarray) -> bool:
    session.reset(1)
    try:
        session.step(ids)
    except GqaExportError:
        return True
    return False


def _refuses_later(session: Any) -> bool:
    """Whether a session limited to three tokens takes three and refuses the fourth."""
    whole = session.capacity
    try:
        session.capacity = min(3, whole)
        session.reset(1)
        session.step(np.zeros((1, session.capacity), np.int64))
        session.step(np.zeros((1, 1), np.int64))
    except GqaExportError:
        return bool(session.lengths[0] == session.capacity)
    finally:
        session.capacity = whole
        session.reset(1)
    return False
