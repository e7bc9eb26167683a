"""The curve of a run: what Trainer logged, as data and as a picture (SVG, drawn here)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import exp, log
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 80, 40, 20, 50
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
    points = [point for curve in curves.values() for point in curve]
    values = [point.loss for point in points] + ([log(level[1])] if level else [])
    low, high = min(values) - 0.05, max(values) + 0.05
    last = max(max(point.step for point in points), 1)

    def place(step: float, loss: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)
        return f"{x:.1f},{y:.1f}"

    colors = ("#1f6fb4", "#c2410c", "#15803d", "#7c3aed", "#525252", "#b8860b", "#be185d")
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
             'font-size="13">', f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
             f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
             f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">optimizer steps</text>',
             f'<text transform="translate(18,{HEIGHT / 2}) rotate(-90)" text-anchor="middle">perplexity</text>']
    for value in _marks(low, high):
        x, y = place(0, log(value)).split(",")
        parts.append(f'<line x1="{x}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{float(x) - 6:.1f}" y="{float(y) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for part in range(5):
        step = last * part / 4
        x, _ = place(step, low).split(",")
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step:.0f}</text>')
    if level:
        start, end = place(0, log(level[1])), place(last, log(level[1]))
        parts.append(f'<polyline points="{start} {end}" stroke="#525252" stroke-dasharray="6 4" fill="none"/>')
        x, y = end.split(",")
        parts.append(f'<text x="{x}" y="{float(y) - 5:.1f}" text-anchor="end">{escape(level[0])} {level[1]:.2f}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        color = colors[number % len(colors)]
        line = " ".join(place(point.step, point.loss) for point in curve)
        parts.append(f'<polyline points="{line}" stroke="{color}" stroke-width="1.6" fill="none"/>')
        for point in curve if len(curve) <= 40 else ():
            x, y = place(point.step, point.loss).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>')
        line_y = TOP + 14 + 18 * number
        parts.append(f'<text x="{WIDTH - RIGHT - 8}" y="{line_y}" text-anchor="end" fill="{color}">'
                     f"{escape(name)}</text>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _marks(low: float, high: float) -> list[float]:
    """Round perplexities between two losses, not more than eight of them."""
    found = [mark * 10**power for power in range(0, 7) for mark in MARKS if low <= log(mark * 10**power) <= high]
    return found[:: 1 + len(found) // 9] or [round(exp((low + high) / 2), 3)]
