"""A verdict on the terminal: a table, what went wrong and where. Files are written by `gqa_export.report`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..compare.case_verdict import EXACT, SHIPPED, CaseVerdict, KindVerdict
from ..compare.verdict import Verdict
from . import long_report

REFUSAL = "refusal"


def print_verdict(verdict: Verdict, console: Console, short: bool = False) -> None:
    """Case x kind of output, then what went wrong and where, then the verdict in one line. short: of a verdict that
    passed, one line for each kind of output instead of the table."""
    if short and verdict.passed:
        for line in (*summary(verdict), *details(verdict)):
            console.print(Text(line), soft_wrap=True)
        return
    table = Table(title=f"{Path(verdict.bundle).name} ({verdict.target}, {verdict.checked_dtype}, {verdict.provider})"
                        f" against {verdict.against}", title_justify="left")
    for column in ("case", "output"):
        table.add_column(column)
    for column in ("max |difference|", "allowed", "PyTorch's own", "best token"):
        table.add_column(column, justify="right")
    table.add_column("")
    for case in verdict.cases:
        rows = folded([_cells(case, kind) for kind in case.kinds])
        for number, row in enumerate(rows):
            table.add_row(case.name if number == 0 else "", *row, end_section=number == len(rows) - 1)
    console.print(table)
    if verdict.long is not None:
        long_report.show(verdict.long, console)
    for line in details(verdict):
        console.print(Text(line), soft_wrap=True)


def folded(rows: Sequence[tuple[Text, ...]]) -> list[tuple[Text, ...]]:
    """Rows without their repetitions: of equal ones the first, with how many there are."""
    found: list[tuple[Text, ...]] = []
    counts: list[int] = []
    for row in rows:
        if found and found[-1] == row:
            counts[-1] += 1
        else:
            found.append(row)
            counts.append(1)
    return [(Text(f"{row[0].plain} ({count})"), *row[1:]) if count > 1 else row
            for row, count in zip(found, counts, strict=True)]


def summary(verdict: Verdict) -> list[str]:
    """A line for each kind of output: its largest error in all cases as a part of what is allowed there."""
    worst: dict[str, KindVerdict] = {}
    cases: Counter[str] = Counter()
    for case in verdict.cases:
        cases.update({kind.kind for kind in case.kinds})
        for kind in case.kinds:
            known = worst.setdefault(kind.kind, kind)
            if kind.max_abs * known.bound > known.max_abs * kind.bound:
                worst[kind.kind] = kind
    lines = [f"  {name}: max |difference| {kind.max_abs:.2e}, allowed {kind.bound:.2e} ({cases[name]} cases)"
             for name, kind in worst.items() if name != REFUSAL]
    refused = sum(kind.kind == REFUSAL for case in verdict.cases for kind in case.kinds)
    return [*lines, *([f"  {refused} calls that must be refused were refused"] if refused else [])]


def _cells(case: CaseVerdict, kind: KindVerdict) -> tuple[Text, ...]:
    best = f"{case.top1_agreed}/{case.rows}" if kind.kind == "logits" else ""
    ok = kind.passed and not (kind.kind == "logits" and case.parted)
    numbers = (Text(f"{number:.2e}") for number in (kind.max_abs, kind.bound, kind.same_dtype_baseline))
    return (Text(kind.kind), *numbers, Text(best), Text("ok", "green") if ok else Text("DIFFERS", "bold red"))


def parts_lines(verdict: Verdict) -> list[str]:
    """Of a bundle whose weights are quantized: whether it rounds activations, and the two verdicts if it does."""
    words = {"int8": "rounded to int8 in quantized matrix products (accuracy level 4)", "exact": "exact, not rounded",
             "same": "rounded to the type of their weight (FP8, NVFP4) in products with such weights"}
    lines = [f"activations: {words[verdict.activations]}"] if verdict.activations else []
    for part, passed in ((EXACT, verdict.export_exact), (SHIPPED, verdict.as_shipped)):
        if passed is not None:
            lines.append(f"{part}: {'passed' if passed else 'DIFFERENT'}")
    return lines


def verdict_word(verdict: Verdict) -> str:
    """PASSED, DIFFERENT, or LOSS where the cases passed and the loss exceeds its limits."""
    return "PASSED" if verdict.passed else "LOSS" if verdict.same else "DIFFERENT"


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
    lines += parts_lines(verdict)
    lines.append(f"loss: {verdict.loss_label}")
    if verdict.approximated:
        lines.append(f"long prompts: {verdict.long_label}")
    lines += [f"LOST TOO MUCH: {failure}" for failure in verdict.lost]
    eager = verdict.max_abs_logits_eager
    beside = "" if eager is None else f", to PyTorch {verdict.checked_dtype} eager {eager:.2e}"
    lines.append(f"{verdict_word(verdict)}: max |logit difference| to PyTorch "
                 f"{verdict.reference_dtype} {verdict.max_abs_logits:.2e}{beside}; {len(verdict.cases)} cases, "
                 f"{verdict.seconds:.1f} s")
    return lines
