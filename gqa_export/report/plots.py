"""Plots as inline SVG: no library, no script, colours by CSS class, so that they follow the page.

The vertical axis of both is the share of the allowed difference on a logarithmic scale; 1 is the bound, everything
above it is wrong. What is not finite sits on the upper edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..compare.case_verdict import CaseVerdict
from .svg import Frame, element, points, text

WIDTH, HEIGHT = 560, 220
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 12, 34
LOWEST = 1e-4
"""shares below this are drawn here: too small to matter"""


@dataclass(frozen=True)
class Series:
    """points: (x, share). name is also the CSS class."""

    name: str
    points: tuple[tuple[float, float], ...]
    titles: tuple[str, ...]


def layers(case: CaseVerdict) -> str:
    """Error of every layer's keys and values, the worst of all steps; "" where the case has none."""
    rows: dict[str, list[tuple[float, float, str]]] = {"keys": [], "values": []}
    for output in case.outputs:
        words = output.output.split()  # "layer 7 key"
        if words[0] == "layer":
            rows[f"{words[2]}s"].append((int(words[1]), output.share, f"{output.output}: {output.max_abs:.2e} of "
                                         f"{output.bound:.2e} allowed, step {output.step}"))
    series = [Series(name, tuple((x, y) for x, y, _ in points), tuple(title for *_, title in points))
              for name, points in rows.items() if points]
    return _plot(series, "layer", lines=False) if series else ""


def steps(case: CaseVerdict) -> str:
    """Error of every step, by kind of output; "" where the case has none."""
    series = []
    for kind in ("keys", "values", "states", "hidden states", "logits"):
        found = [(step.step, step.shares[kind], step.phase) for step in case.trail if kind in step.shares]
        if found:
            titles = tuple(f"step {x} ({phase}), {kind}: {y:.3g} of what is allowed" for x, y, phase in found)
            series.append(Series(kind, tuple((x, y) for x, y, _ in found), titles))
    return _plot(series, "step", lines=True) if series else ""


def _plot(series: Sequence[Series], axis: str, *, lines: bool) -> str:
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points if math.isfinite(y)]
    low = math.floor(math.log10(max(LOWEST, min([*ys, 0.1]))))
    high = max(1, math.ceil(math.log10(max([*ys, 1.0]))))
    if any(not math.isfinite(y) for each in series for _, y in each.points):
        high += 1
    frame = Frame(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, (min(xs), max(max(xs), min(xs) + 1)), (low, high))

    def down(share: float) -> float:
        share = share if math.isfinite(share) else 10.0**high
        return frame.down(min(max(math.log10(share) if share > 0 else low, low), high))

    bound = down(1.0)
    parts = [_grid(frame, low, high),
             element("rect", class_="wrong", x=LEFT, y=TOP, width=WIDTH - LEFT - RIGHT, height=bound - TOP),
             element("line", class_="bound", x1=LEFT, x2=WIDTH - RIGHT, y1=bound, y2=bound)]
    parts += [_label("tick", frame.across(tick), HEIGHT - BOTTOM + 15, str(tick)) for tick in _ticks(*frame.x)]
    parts.append(_label("axis", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, axis))
    for each in series:
        places = [(frame.across(x), down(y)) for x, y in each.points]
        if lines and len(places) > 1:
            parts.append(element("polyline", class_=f"line {each.name}", points=points(places)))
        radius = "3" if len(places) <= 80 else "1.2"
        for (x, y), title, (_, value) in zip(places, each.titles, each.points):
            bad = "" if value <= 1 else " bad"
            parts.append(element("circle", element("title", escape(title)), class_=f"dot {each.name}{bad}", cx=x, cy=y,
                                 r=radius))
    names = ", ".join(each.name for each in series)
    return element("svg", "".join(parts), class_="plot", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
                   aria_label=f"share of the allowed difference by {axis}: {names}")


def _label(kind: str, x: float, y: int, words: str) -> str:
    return text(words, class_=kind, x=x, y=y, text_anchor="middle")


def _grid(frame: Frame, low: int, high: int) -> str:
    parts = []
    for power in range(low, high + 1):
        y, words = frame.down(power), "allowed" if power == 0 else f"{10.0**power:g}"
        parts += [element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y),
                  text(words, class_="tick", x=LEFT - 6, y=y + 3.5, text_anchor="end")]
    return "".join(parts)


def _ticks(low: float, high: float) -> list[int]:
    """At most nine whole numbers over the range, in steps of 1, 2 or 5 times a power of ten."""
    span, step = high - low, 1
    for factor in (2, 2.5, 2) * 12:
        if span / step <= 8:
            break
        step = int(step * factor)
    first = -(-int(low) // step) * step
    return list(range(first, int(high) + 1, step))
