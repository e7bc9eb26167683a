"""What a run of `validate` came to, and the files that tell of it. A run that ends in an error writes them too, so
that a CI system never reads those of the run before."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from ..compare.verdict import Verdict
from ..errors import EXIT_BUG, EXIT_DIFFERENT, EXIT_NOT_CHECKED, EXIT_PASSED, GqaExportError
from .baseline import Drift


class Crash(GqaExportError):
    """What stands in a report for an exception that is not a refusal: a bug, an interruption."""

    exit_code = EXIT_BUG


@dataclass(frozen=True)
class Outcome:
    """verdicts: one per bundle. drifts: what left the baseline. problem: the refusal in place of a verdict."""

    bundles: tuple[str, ...]
    against: str
    verdicts: tuple[Verdict, ...] = ()
    drifts: tuple[Drift, ...] = ()
    notes: tuple[str, ...] = ()
    problem: GqaExportError | None = None

    @property
    def exit_code(self) -> int:
        """0 passed; 1 outputs differ, or drifted; 2 bad input; 3 could not be checked here; 70 a bug or an
        interruption."""
        if self.problem is not None:
            return self.problem.exit_code
        return EXIT_PASSED if self.passed else EXIT_DIFFERENT

    @property
    def passed(self) -> bool:
        """Whether there are verdicts, all passed, and nothing drifted."""
        good = bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)
        return good and not self.drifts and self.problem is None

    @property
    def word(self) -> str:
        """PASSED, DIFFERENT, LOSS (outputs are the same, more was lost than allowed), DRIFTED, NOT CHECKED or ERROR."""
        if self.problem is not None:
            return "NOT CHECKED" if self.problem.exit_code == EXIT_NOT_CHECKED else "ERROR"
        if self.passed:
            return "PASSED"
        if not all(verdict.same for verdict in self.verdicts):
            return "DIFFERENT"
        return "DRIFTED" if all(verdict.passed for verdict in self.verdicts) else "LOSS"


def environment() -> dict[str, str]:
    """What ran this: nothing that names a person or a machine."""
    return {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}",
            "machine": platform.machine(), "cores": str(os.cpu_count() or "unknown")}
