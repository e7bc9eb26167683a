"""`--github-summary`: the verdict as Markdown, appended to the summary of a step of GitHub Actions.

Source: https://docs.github.com/actions, "Adding a job summary": the file named by GITHUB_STEP_SUMMARY, Markdown.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..compare.case_verdict import CaseVerdict, KindVerdict
from ..compare.verdict import Verdict
from ..errors import GqaExportError
from .console import parts_lines
from .outcome import Outcome

VARIABLE = "GITHUB_STEP_SUMMARY"


def summary_file() -> Path:
    """Where the summary goes; GqaExportError outside of GitHub Actions."""
    named = os.environ.get(VARIABLE)
    if not named:
        raise GqaExportError(f"{VARIABLE} is not set: this is not a step of GitHub Actions", "--github-summary",
                             "leave it out here; --html writes a page for people", code="E-REPORT-GITHUB")
    return Path(named)


def append(outcome: Outcome) -> None:
    """Append the summary."""
    path = summary_file()
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(markdown(outcome))
    except OSError as error:
        raise GqaExportError(f"cannot write the summary: {error.strerror}", str(path),
                             f"check what {VARIABLE} names", code="E-REPORT-GITHUB-WRITE") from error


def markdown(outcome: Outcome) -> str:
    """The summary: the verdict, a table per bundle, what went wrong, the notes."""
    mark = "✅" if outcome.passed else "❌"
    lines = [f"## {mark} gqa-export validate: {outcome.word}", ""]
    if outcome.problem is not None:
        lines += [f"**{_plain(outcome.problem.what)}**", "", f"- at: {_plain(outcome.problem.where)}",
                  f"- fix: {_plain(outcome.problem.fix)}", ""]
    for verdict in outcome.verdicts:
        lines += _bundle(verdict)
    lines += [f"- drift: {_plain(str(drift))}" for drift in outcome.drifts]
    lines += [f"- {_plain(note)}" for note in outcome.notes]
    return "\n".join(lines) + "\n\n"


def _bundle(verdict: Verdict) -> list[str]:
    facts = f"{verdict.target}, {verdict.checked_dtype}, {verdict.cache} cache, {verdict.provider}"
    lines = [f"### {_plain(Path(verdict.bundle).name)} ({facts}) against {_plain(verdict.against)}", "",
             "| case | output | max difference | allowed | best token | |", "|---|---|---:|---:|---:|---|"]
    for case in verdict.cases:
        for kind in case.kinds:
            lines.append(_row(case, kind))
    lines.append("")
    lines += [f"- first divergence: {_plain(str(case.first))}" for case in verdict.cases if case.first is not None]
    lines += [f"- **lost too much**: {_plain(failure)}" for failure in verdict.lost]
    lines += [f"- {_plain(line)}" for line in parts_lines(verdict)]
    return [*lines, *(f"- note: {_plain(note)}" for note in verdict.notes), f"- loss: {_plain(verdict.loss_label)}",
            *([f"- long prompts: {_plain(verdict.long_label)}"] if verdict.approximated else []),
            f"- compared: {', '.join(verdict.compared) or 'nothing'}", ""]


def _row(case: CaseVerdict, kind: KindVerdict) -> str:
    best = f"{case.top1_agreed}/{case.rows}" if kind.kind == "logits" else ""
    good = kind.passed and not (kind.kind == "logits" and case.parted)
    alone = sum(each.kind == kind.kind for each in case.kinds) == 1
    label = kind.kind if alone else _plain(kind.output)
    return (f"| {_plain(case.name)} | {label} | {kind.max_abs:.2e} | {kind.bound:.2e} | {best} | "
            f"{'ok' if good else '**DIFFERS**'} |")


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: names of files and checkpoints come from outside."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\r", " ").replace("\n", " ")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#!@" else letter for letter in text)
