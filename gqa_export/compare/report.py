"""A verdict for people and machines: a table on the terminal, JSON, JUnit XML."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .verdict import CaseVerdict, KindVerdict, Verdict


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
    return (Text(kind.kind), Text(f"{kind.max_abs:.2e}"), Text(f"{kind.bound:.2e}"), Text(f"{kind.yardstick:.2e}"),
            Text(best), Text("ok", "green") if ok else Text("DIFFERS", "bold red"))


def details(verdict: Verdict) -> list[str]:
    """What the table cannot hold, one line each; the last line is the verdict."""
    lines = []
    for case in verdict.cases:
        if case.first is not None:
            lines.append(f"first divergence: {case.first}")
        if case.parted is not None:
            c = case.parted
            lines.append(f"case {case.name}, step {c.step}, batch {c.row}: best token {c.got}, expected {c.expected} "
                         f"(preferred by {c.margin:.3g}, no tie)")
        lines += [f"case {case.name}, step {c.step}, batch {c.row}: a tie between tokens {c.expected} and {c.got} "
                  f"(margin {c.margin:.3g})" for c in case.ties]
    lines += [f"note: {note}" for note in verdict.notes]
    eager = verdict.max_abs_logits_eager
    beside = "" if eager is None else f", to PyTorch {verdict.checked_dtype} eager {eager:.2e}"
    lines.append(f"{'PASSED' if verdict.passed else 'DIFFERENT'}: max |logit difference| to PyTorch "
                 f"{verdict.truth_dtype} {verdict.max_abs_logits:.2e}{beside}; {len(verdict.cases)} cases, "
                 f"{verdict.seconds:.1f} s")
    return lines


def write_json(verdict: Verdict, path: Path) -> None:
    """The verdict as JSON, schema `gqa_export.compare.verdict.SCHEMA_VERSION`."""
    path.write_text(json.dumps(verdict.to_dict(), indent=1) + "\n", encoding="utf-8")


def write_junit(verdict: Verdict, path: Path) -> None:
    """The verdict as JUnit XML: one test per case and kind of output."""
    rows = [(case, kind) for case in verdict.cases for kind in case.kinds]
    failed = 0
    suite = ElementTree.Element("testsuite", name=f"gqa-export validate {Path(verdict.bundle).name}")
    for case, kind in rows:
        test = ElementTree.SubElement(suite, "testcase", classname=f"gqa_export.validate.{case.name}", name=kind.kind,
                                      time=f"{case.seconds / len(case.kinds):.3f}")
        wrong = str(kind.first) if kind.first is not None else ""
        if kind.kind == "logits" and case.parted is not None:
            wrong = wrong or f"best token {case.parted.got}, expected {case.parted.expected}"
        if wrong:
            failed += 1
            ElementTree.SubElement(test, "failure", message=wrong).text = case.purpose
    suite.set("tests", str(len(rows)))
    suite.set("failures", str(failed))
    suite.set("time", f"{verdict.seconds:.3f}")
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
