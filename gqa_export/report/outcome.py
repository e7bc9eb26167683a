"""What a run of `validate` came to, and the files that tell of it. A run that ends in an error writes them too, so
that a CI system never reads those of the run before."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..compare.verdict import Verdict
from ..errors import EXIT_DIFFERENT, EXIT_PASSED, GqaExportError
from .baseline import Baseline, Drift


@dataclass(frozen=True)
class Outcome:
    """verdicts: one per bundle. drifts: what left the baseline. problem: why there is no verdict."""

    bundles: tuple[str, ...]
    against: str
    verdicts: tuple[Verdict, ...] = ()
    drifts: tuple[Drift, ...] = ()
    notes: tuple[str, ...] = ()
    problem: GqaExportError | None = None

    @property
    def exit_code(self) -> int:
        """0 passed; 1 outputs differ, or drifted; 2 bad input; 3 could not be checked here."""
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
        """PASSED, DIFFERENT, DRIFTED, NOT CHECKED or ERROR."""
        if self.problem is not None:
            return "ERROR" if self.problem.exit_code == 2 else "NOT CHECKED"
        if self.passed:
            return "PASSED"
        return "DIFFERENT" if not all(verdict.passed for verdict in self.verdicts) else "DRIFTED"


@dataclass(frozen=True)
class Reports:
    """The files that were asked for. github: append to the summary of a step of GitHub Actions."""

    json: Path | None = None
    junit: Path | None = None
    html: Path | None = None
    github: bool = False
    baseline: Path | None = None
    update_baseline: bool = False

    def check(self) -> None:
        """Refuse, before the work, what could not be written or read after it."""
        for option, path in (("--json", self.json), ("--junit", self.junit), ("--html", self.html),
                             ("--baseline", self.baseline if self.update_baseline else None)):
            if path is not None and not path.absolute().parent.is_dir():
                raise GqaExportError(f"the folder of the file does not exist: {path.absolute().parent}", option,
                                     "make the folder first")
        if self.update_baseline and self.baseline is None:
            raise GqaExportError("there is no baseline to update", "--update-baseline", "name it with --baseline FILE")
        if self.github:
            from .github import summary_file

            summary_file()
        if self.baseline is not None and not self.update_baseline:
            Baseline.read(self.baseline)

    def finish(self, bundles: Sequence[str], against: str, verdicts: Sequence[Verdict]) -> Outcome:
        """Hold the verdicts against the baseline (or put them into it), write every file, say how it ended."""
        drifts: tuple[Drift, ...] = ()
        notes: tuple[str, ...] = ()
        if self.baseline is not None and self.update_baseline:
            notes = Baseline.update(self.baseline, verdicts)
        elif self.baseline is not None:
            drifts, notes = Baseline.read(self.baseline).judge(verdicts)
        outcome = Outcome(tuple(bundles), against, tuple(verdicts), drifts, notes)
        self.write(outcome)
        return outcome

    def failed(self, bundles: Sequence[str], against: str, problem: GqaExportError) -> None:
        """Write every file about a run that came to no verdict."""
        self.write(Outcome(tuple(bundles), against, problem=problem))

    def write(self, outcome: Outcome) -> None:
        """Write the files of an outcome."""
        if self.json is not None:
            from .json_schema import text

            write_text(self.json, text(outcome))
        if self.junit is not None:
            from . import junit

            write_text(self.junit, junit.text(outcome))
        if self.html is not None:
            from .html import page

            write_text(self.html, page(outcome))
        if self.github:
            from .github import append

            append(outcome)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or leave the old one: it appears at once. GqaExportError where that is not possible."""
    staged = ""
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.absolute().parent, prefix=f".{path.name}.",
                                         delete=False) as file:
            staged = file.name
            file.write(text)
        os.chmod(staged, 0o644)
        os.replace(staged, path)
    except OSError as error:
        raise GqaExportError(f"cannot write the file: {error.strerror}", str(path),
                             "free some space, or name another file") from error
    finally:
        with suppress(OSError):
            if staged:
                os.unlink(staged)


def environment() -> dict[str, str]:
    """What ran this: nothing that names a person or a machine."""
    return {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}",
            "machine": platform.machine(), "cores": str(os.cpu_count() or "unknown")}
