"""A verdict on the terminal: a table, what went wrong and where. Files are written by `gqa_export.report`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..compare.verdict import CaseVerdict, KindVerdict, Verdict


def print_verdict(verdict: Verdict, console: Console) -> None:
    """Case x kind of output, then what went wrong and where, then the verdict in one line."""
    table = Table(title=f"{Path(verdict.bundle).name} ({verdict.target}, {verdict.checked_dtype}, {verdict.provider})"
                        f" against {verdict.against}", title_justify="left")
    for column in ("case", "output"):
        table.add_column(column)
    for column in ("max |difference|", "allowed", "PyTorch's own", "best token"):
        table.add_column(column, justify="right")
    table.add_column("")
    for case in verdict.cases:
        for number, kind in enumerate(case.kinds):
            table.add_row(case.name if number == 0 else "", *_cells(case, kind), end_section=kind is case.kinds[-1])
    console.print(table)
    for line in details(verdict):
        console.print(Text(line), soft_wrap=True)


def _cells(case: CaseVerdict, kind: KindVerdict) -> tuple[Text, ...]:
    best = f"{case.top1_agreed}/{case.rows}" if kind.kind == "logits" else ""
    ok = kind.passed and not (kind.kind == "logits" and case.parted)
    numbers = (Text(f"{number:.2e}") for number in (kind.max_abs, kind.bound, kind.same_dtype_baseline))
    return (Text(kind.kind), *numbers, Text(best), Text("ok", "green") if ok else Text("DIFFERS", "bold red"))


def details(verdict: Verdict) -> list[str]:
    """What the table cannot hold, one line each; the last line is the verdict."""
    lines = []
    for case in verdict.cases:
        if case.first is not None:
            lines.append(f"first divergence: {case.first}")
        if case.parted is not None:
            lines.append(case.wrong_token)
        lines += [f"case {case.name}, step {c.step}, batch {c.row}: a tie between tokens {c.expected} and {c.got} "
                  f"(margin {c.margin:.3g})" for c in case.ties]
    if verdict.overflow:
        lines.append(f"reason: {verdict.overflow}")
    lines += [f"note: {note}" for note in verdict.notes]
    lines.append(f"compared: {', '.join(verdict.compared) or 'nothing'}")
    eager = verdict.max_abs_logits_eager
    beside = "" if eager is None else f", to PyTorch {verdict.checked_dtype} eager {eager:.2e}"
    lines.append(f"{'PASSED' if verdict.passed else 'DIFFERENT'}: max |logit difference| to PyTorch "
                 f"{verdict.reference_dtype} {verdict.max_abs_logits:.2e}{beside}; {len(verdict.cases)} cases, "
                 f"{verdict.seconds:.1f} s")
    return lines
