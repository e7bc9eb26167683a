"""The suite passes a ring's seam also where nothing can be written into the cache."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from gqa_export.compare.cases import Case, Plan
from gqa_export.validation import run_cases
from gqa_export.validation.sessions import Sessions


def case(entry: str) -> Case:
    return Case(entry, entry, (np.array([1]),), ((1,),), 1, garbage=(1.0,), entry=entry)


def test_without_garbage_the_ring_is_passed_all_the_same_and_the_tail_is_left_out(monkeypatch) -> None:
    ran: list[Case] = []
    monkeypatch.setattr(run_cases, "run_case", lambda sessions, one, *rest, **named: ran.append(one) or "log")
    session = SimpleNamespace(capacity=8, whole_row_masks=False)
    logs = run_cases.run_cases(Sessions(session, None, session), Plan((case("ring N"), case("garbage_tail")), ()))
    assert logs == ["log"]
    assert [(one.entry, one.garbage) for one in ran] == [("ring N", ())]
