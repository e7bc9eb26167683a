"""A long measurement in stages: what is finished is on the disk, whenever and however the process ends.

Standard library only. Results are one plain dictionary. A stage returns what it found, and that is merged and written
when the stage is over: a kill in its middle loses this stage and nothing else.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

DONE, SKIPPED, FAILED, STOPPED = "done", "skipped", "failed", "stopped"
Results = dict[str, Any]


class Stopped(BaseException):
    """The process was told to end (SIGTERM)."""


@dataclass(frozen=True)
class Stage:
    """One part. seconds: how long it is expected to take; run: given the results so far, what it adds to them, a list
    being added to the list that is there."""

    name: str
    seconds: float
    run: Callable[[Results], Results]


def finished(results: Results) -> set[str]:
    """Names of the stages whose results are there."""
    return {name for name, fact in results.get("stages", {}).items() if fact["status"] == DONE}


def run_stages(stages: Sequence[Stage], results: Results, save: Callable[[Results], None], *,
               budget_s: float = 0.0) -> bool:
    """Run the stages that `results` does not hold yet; write after each. False if the process was told to end.

    Args:
        stages: in order, the most wanted first.
        results: changed in place; its "stages" hold what became of each.
        save: writes the results.
        budget_s: a stage that is not expected to end within so many seconds from now is skipped; 0 for no limit.
    """
    began = time.monotonic()
    facts = results.setdefault("stages", {})
    with Terminator() as terminator:
        try:
            for stage in stages:
                if stage.name in finished(results):
                    continue
                left = budget_s - (time.monotonic() - began)
                if budget_s and stage.seconds > left:
                    note = f"about {stage.seconds:.0f} s, {max(left, 0):.0f} s were left"
                    facts[stage.name] = {"status": SKIPPED, "seconds": 0.0, "note": note}
                    continue
                facts[stage.name] = {"status": STOPPED, "seconds": 0.0, "note": "the process ended in its middle"}
                start = time.monotonic()
                with terminator.raising():
                    found, fact = _attempt(stage, results)
                merge(results, found)
                facts[stage.name] = {**fact, "seconds": round(time.monotonic() - start, 1)}
                save(results)
                terminator.check()
        except Stopped:
            save(results)
            return False
    save(results)
    return True


def _attempt(stage: Stage, results: Results) -> tuple[Results, dict[str, Any]]:
    try:
        return stage.run(results), {"status": DONE, "note": ""}
    except Exception as error:  # the stages after it are worth having: its reason goes into the report
        words = str(error).splitlines()
        return {}, {"status": FAILED, "note": f"{type(error).__name__}: {words[0] if words else ''}"[:200]}


def merge(results: Results, found: Results) -> None:
    """Add what a stage found."""
    for name, value in found.items():
        if isinstance(value, list):
            results[name] = [*results.get(name, []), *value]
        else:
            results[name] = value


class Terminator:
    """Turns SIGTERM into Stopped: at once while a stage runs, else where `check` is called, so that results are never
    half merged or half written."""

    def __init__(self) -> None:
        self._wanted = self._raises = False
        self._before: Any = None

    def __enter__(self) -> Terminator:
        self._before = signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._wanted = True
        if self._raises:
            self._raises = False
            raise Stopped

    @contextmanager
    def raising(self) -> Iterator[None]:
        """A stage runs: what it has found so far may be lost."""
        self.check()
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def check(self) -> None:
        """Raise Stopped if the process was told to end."""
        if self._wanted:
            raise Stopped
