"""Plots as inline SVG, drawn by hand: no library, no script, colours by CSS class, so that they follow the page.

The vertical axis of both is the share of the allowed difference on a logarithmic scale; 1 is the bound, everything
above it is wrong. What is not finite sits on the upper edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from ..compare.verdict import CaseVerdict

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
    for kind in ("keys", "values", "logits"):
        found = [(step.step, step.shares[kind], step.phase) for step in case.trail if kind in step.shares]
        if found:
            titles = tuple(f"step {x} ({phase}), {kind}: {y:.3g} of what is allowed" for x, y, phase in found)
            series.append(Series(kind, tuple((x, y) for x, y, _ in found), titles))
    return _plot(series, "step", lines=True) if series else ""


def _plot(series: Sequence[Series], axis: str, *, lines: bool) -> str:
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points if math.isfinite(y)]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    low = 10.0 ** math.floor(math.log10(max(LOWEST, min([*ys, 0.1]))))
    high = 10.0 ** max(1, math.ceil(math.log10(max([*ys, 1.0]))))
    if any(not math.isfinite(y) for each in series for _, y in each.points):
        high *= 10

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        y = min(max(y if math.isfinite(y) else high, low), high)
        return TOP + (math.log10(high) - math.log10(y)) / (math.log10(high) - math.log10(low)) * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(down, low, high), f'<rect class="wrong" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
             f'height="{down(1.0) - TOP:.1f}"/>',
             f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(1.0):.1f}" y2="{down(1.0):.1f}"/>']
    for tick in _ticks(x_low, x_high):
        parts.append(_text("tick", across(tick), HEIGHT - BOTTOM + 15, str(tick)))
    parts.append(_text("axis", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, axis))
    for each in series:
        places = [(across(x), down(y)) for x, y in each.points]
        if lines and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="line {each.name}" points="{path}"/>')
        radius = 3 if len(places) <= 80 else 1.2
        for (x, y), title, (_, value) in zip(places, each.titles, each.points):
            bad = "" if value <= 1 else " bad"
            parts.append(f'<circle class="dot {each.name}{bad}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
                         f"<title>{escape(title)}</title></circle>")
    label = escape(f"share of the allowed difference by {axis}: {', '.join(each.name for each in series)}")
    return (f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">' + "".join(parts)
            + "</svg>")


def _text(kind: str, x: float, y: float, what: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="middle">{escape(what)}</text>'


def _grid(down: Callable[[float], float], low: float, high: float) -> str:
    parts = []
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        y = down(10.0**power)
        label = "allowed" if power == 0 else f"{10.0**power:g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
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
