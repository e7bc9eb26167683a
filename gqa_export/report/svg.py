"""The parts that the project's plots are drawn of, as text: no library, no script. Numbers have one decimal.

Dimensions: pixels; y grows downwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Frame:
    """The field of a plot inside its margins.

    Attributes:
        width, height: of the whole picture. left, right, top, bottom: margins.
        x, y: the range of values from left to right, and from bottom to top; logarithms are the caller's.
    """

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x: tuple[float, float] = (0.0, 1.0)
    y: tuple[float, float] = (0.0, 1.0)

    def across(self, value: float) -> float:
        """Where a value of the horizontal axis lies."""
        low, high = self.x
        return self.left + (self.width - self.left - self.right) * (value - low) / (high - low)

    def down(self, value: float) -> float:
        """Where a value of the vertical axis lies."""
        low, high = self.y
        return self.top + (self.height - self.top - self.bottom) * (high - value) / (high - low)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies."""
        return self.across(x), self.down(y)


def element(tag: str, content: str | None = None, **attributes: object) -> str:
    """One element. Attributes in the order given, `text_anchor` as text-anchor, `class_` as class; content as it is."""
    parts = [f' {name.rstrip("_").replace("_", "-")}="{_written(value)}"' for name, value in attributes.items()]
    return f"<{tag}{''.join(parts)}" + ("/>" if content is None else f">{content}</{tag}>")


def text(words: str, **attributes: object) -> str:
    """A line of text, escaped."""
    return element("text", escape(words), **attributes)


def points(places: Iterable[tuple[float, float]]) -> str:
    """The attribute `points` of a polyline."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _written(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else escape(str(value))
