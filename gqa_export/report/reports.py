"""The report files of one run of `validate`, written whatever the run came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..compare.verdict import Verdict
from ..errors import GqaExportError
from ..files.write_text import write_text
from .baseline import Baseline, Drift
from .outcome import Outcome


@dataclass(frozen=True)
class Reports:
    """The files that are wanted. github: append to the summary of a step of GitHub Actions."""

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
                                     "make the folder first", code="E-REPORT-FOLDER")
        if self.update_baseline and self.baseline is None:
            raise GqaExportError("--update-baseline needs a baseline to write", "--update-baseline",
                                 "name it with --baseline FILE", code="E-OPTION-UPDATE-BASELINE")
        if self.github:
            from .github import summary_file

            summary_file()
        if self.baseline is not None and not self.update_baseline:
            Baseline.read(self.baseline)

    def finish(self, bundles: Sequence[str], against: str, verdicts: Sequence[Verdict]) -> Outcome:
        """Hold the verdicts against the baseline (or put them into it), write every file, tell how it ended."""
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
