"""Line charts for docs/benchmarks, drawn as SVG by the parts that the reports use. Imported by benchmark scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gqa_export.report.svg import Frame, element, points, text

INK, SOFT, GRID = "#1f2933", "#5d6670", "#dfe2e6"
COLOURS = ("#2f6f9f", "#b5651d", "#4d7c3a", "#7a3ea1", "#8a8a8a")
WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 66, 130, 44, 48


@dataclass(frozen=True)
class Line:
    """A curve. dashed: of what is only for comparison."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis: its label, where it has ticks (the first and the last are its ends), logarithmic or not."""

    label: str
    ticks: Sequence[float]
    logarithmic: bool = False

    @property
    def place(self) -> Callable[[float], float]:
        """A value as it is measured along the axis."""
        return math.log10 if self.logarithmic else float


def chart(title: str, across: Axis, up: Axis, lines: Sequence[Line]) -> str:
    """The whole SVG: every line with its name at its end."""
    x, y = across.place, up.place
    frame = Frame(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, (x(across.ticks[0]), x(across.ticks[-1])),
                  (y(up.ticks[0]), y(up.ticks[-1])))
    right, bottom = float(WIDTH - RIGHT), float(HEIGHT - BOTTOM)
    parts = [element("title", title), element("rect", width=WIDTH, height=HEIGHT, fill="white"),
             text(title, x=LEFT, y=22, font_size=14, font_weight="bold", fill=INK)]
    for tick in up.ticks:
        height = frame.down(y(tick))
        parts += [element("line", x1=float(LEFT), x2=right, y1=height, y2=height, stroke=GRID),
                  text(f"{tick:g}", x=LEFT - 6, y=height + 4, font_size=11, text_anchor="end", fill=SOFT)]
    for tick in across.ticks:
        parts.append(text(f"{tick:g}", x=frame.across(x(tick)), y=bottom + 16, font_size=11, text_anchor="middle",
                          fill=SOFT))
    parts += [text(across.label, x=(LEFT + right) / 2, y=HEIGHT - 10, font_size=12, text_anchor="middle", fill=SOFT),
              text(up.label, x=LEFT, y=TOP - 8, font_size=12, fill=SOFT)]
    names: list[tuple[float, str, str]] = []
    for line, colour in zip(lines, COLOURS):
        places = [frame.place(x(a), y(b)) for a, b in line.points]
        parts.append(element("polyline", points=points(places), fill="none", stroke=colour, stroke_width=2,
                             **({"stroke_dasharray": "5 4"} if line.dashed else {})))
        parts += [element("circle", cx=a, cy=b, r=3, fill=colour) for a, b in places]
        names.append((places[-1][1] + 4, line.name, colour))
    below = -math.inf
    for height, name, colour in sorted(names):  # names that would lie on one another are moved apart
        below = max(height, below + 14)
        parts.append(text(name, x=right + 8, y=below, font_size=12, fill=colour))
    return element("svg", "".join(f"\n{part}" for part in parts) + "\n", xmlns="http://www.w3.org/2000/svg",
                   viewBox=f"0 0 {WIDTH} {HEIGHT}", font_family="Helvetica, Arial, sans-serif", role="img") + "\n"
