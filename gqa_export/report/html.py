"""`--html`: one page that needs nothing else: no network, no script. Everything from outside is escaped by jinja2."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..compare.case_verdict import CaseVerdict, KindVerdict
from ..compare.error_trace import Surroundings, share
from ..compare.verdict import Verdict
from . import long_report, plots
from .console import parts_lines
from .outcome import Outcome, environment

TEMPLATE = "report.html.j2"


def page(outcome: Outcome) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    jinja = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True)
    jinja.filters["e2"] = lambda value: f"{value:.2e}"
    jinja.filters["name"] = lambda path: Path(path).name
    return jinja.get_template(TEMPLATE).render(
        outcome=outcome, verdicts=[_verdict(verdict) for verdict in outcome.verdicts], environment=environment(),
        long_style=Markup(long_report.PLOT_STYLE),
        plots={"layers": lambda case: Markup(plots.layers(case)), "steps": lambda case: Markup(plots.steps(case))})


def _verdict(verdict: Verdict) -> dict[str, Any]:
    from markupsafe import Markup

    long = None if verdict.long is None else Markup(long_report.sections(verdict.long))
    return {"facts": verdict, "parts": parts_lines(verdict), "cases": [_case(case) for case in verdict.cases],
            "long": long}


def _case(case: CaseVerdict) -> dict[str, Any]:
    worst = max(case.kinds, key=lambda kind: share(kind.max_abs, kind.bound))
    shown = [kind for kind in case.kinds if kind.around and (not kind.passed or kind is worst)]
    return {"facts": case, "rows": [_row(case, kind) for kind in case.kinds],
            "tables": [_table(kind.around, kind) for kind in shown if kind.around is not None]}


def _row(case: CaseVerdict, kind: KindVerdict) -> dict[str, Any]:
    part = share(kind.max_abs, kind.bound)
    alone = sum(each.kind == kind.kind for each in case.kinds) == 1
    return {"kind": kind, "label": kind.kind if alone else kind.output,
            "share": f"{part:.3f}" if math.isfinite(part) else "inf",
            "bar": round(100 * min(part, 1.0), 1), "good": kind.passed and not (kind.kind == "logits" and case.parted),
            "best": f"{case.top1_agreed}/{case.rows}" if kind.kind == "logits" else ""}


def _table(around: Surroundings, kind: KindVerdict) -> dict[str, Any]:
    """Rows of cells: expected, got, and how much of the allowed difference is between them."""
    unit = "id" if "head" not in around.axes else "feature"
    cells = [[_cell(expected, got, kind.bound, (row, column) == tuple(around.centre))
              for column, (expected, got) in enumerate(zip(*pair))]
             for row, pair in enumerate(zip(around.expected, around.got))]
    rows = [{"token": token, "cells": line} for token, line in zip(around.tokens, cells)]
    width = len(cells[0]) if cells else 0
    place = ", ".join(f"{name} {value}" for name, value in around.axes.items())
    return {"output": kind.output, "place": place, "unit": unit, "rows": rows,
            "columns": list(range(around.first_feature, around.first_feature + width))}


def _cell(expected: float, got: float, bound: float, centre: bool) -> dict[str, Any]:
    part = share(abs(got - expected), bound)
    depth = 0 if part <= 0.01 else min(4, 1 + int(2 * math.log10(max(part, 0.01)) + 4) // 2) if part <= 1 else 5
    return {"expected": f"{expected:.6g}", "got": f"{got:.6g}", "depth": depth, "centre": centre}
