"""The curve of a run: what Trainer logged, as data and as a picture (SVG)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

from ..report.svg import Frame, element, points, text

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 80, 40, 20, 50
COLORS = ("#1f6fb4", "#c2410c", "#15803d", "#7c3aed", "#525252", "#b8860b", "#be185d")
MARKS = (1, 1.5, 2, 3, 5, 7)


@dataclass(frozen=True)
class Point:
    """Loss in nats per token after so many steps."""

    step: int
    loss: float

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where that is too large a number."""
        return exp(self.loss) if self.loss < 700 else float("inf")


def split_log(history: Sequence[dict[str, Any]]) -> tuple[list[Point], list[Point]]:
    """Trainer's log -> (training losses, evaluation losses), by step, the last entry of a step counts."""
    train = {int(entry["step"]): float(entry["loss"]) for entry in history if "loss" in entry}
    held = {int(entry["step"]): float(entry["eval_loss"]) for entry in history if "eval_loss" in entry}
    return ([Point(step, loss) for step, loss in sorted(train.items())],
            [Point(step, loss) for step, loss in sorted(held.items())])


def picture(title: str, curves: Mapping[str, Sequence[Point]], level: tuple[str, float] | None = None) -> str:
    """An SVG: perplexity (log scale) by step, one line per curve. level: a named perplexity to reach, dashed."""
    found = [point for curve in curves.values() for point in curve]
    values = [point.loss for point in found] + ([log(level[1])] if level else [])
    low, high = min(values) - 0.05, max(values) + 0.05
    last = max(max(point.step for point in found), 1)
    frame = Frame(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, (0, last), (low, high))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
             'font-size="13">', element("rect", width=WIDTH, height=HEIGHT, fill="#ffffff"),
             text(title, x=LEFT, y=22, font_size=15),
             text("optimizer steps", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 12, text_anchor="middle"),
             text("perplexity", transform=f"translate(18,{HEIGHT / 2}) rotate(-90)", text_anchor="middle")]
    for value in _marks(low, high):
        x, y = frame.place(0, log(value))
        parts += [element("line", x1=x, y1=y, x2=WIDTH - RIGHT, y2=y, stroke="#e5e5e5"),
                  text(f"{value:g}", x=x - 6, y=round(y, 1) + 4, text_anchor="end")]
    for part in range(5):
        step = last * part / 4
        parts.append(text(f"{step:.0f}", x=frame.across(step), y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
    if level:
        ends = [frame.place(step, log(level[1])) for step in (0, last)]
        parts.append(element("polyline", points=points(ends), stroke="#525252", stroke_dasharray="6 4", fill="none"))
        x, y = ends[1]
        parts.append(text(f"{level[0]} {level[1]:.2f}", x=x, y=round(y, 1) - 5, text_anchor="end"))
    for number, (name, curve) in enumerate(curves.items()):
        color, places = COLORS[number % len(COLORS)], [frame.place(point.step, point.loss) for point in curve]
        parts.append(element("polyline", points=points(places), stroke=color, stroke_width="1.6", fill="none"))
        for x, y in places if len(curve) <= 40 else ():
            parts.append(element("circle", cx=x, cy=y, r=3, fill=color))
        parts.append(text(name, x=WIDTH - RIGHT - 8, y=TOP + 14 + 18 * number, text_anchor="end", fill=color))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _marks(low: float, high: float) -> list[float]:
    """Round perplexities between two losses, not more than eight of them."""
    found = [mark * 10**power for power in range(0, 7) for mark in MARKS if low <= log(mark * 10**power) <= high]
    return found[:: 1 + len(found) // 9] or [round(exp((low + high) / 2), 3)]
