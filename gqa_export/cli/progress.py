"""A progress bar on standard error; silent where standard error is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol


class Bar(Protocol):
    """A running task."""

    def report(self, text: str, done: float | None = None, total: float | None = None) -> None:
        """Say what is being done and, where it is known, how much of it (in any unit)."""

    def close(self) -> None:
        """Take the line away now, because something else is printed from here on."""


class SilentBar:
    """What a pipe or a log file gets: nothing."""

    def report(self, text: str, done: float | None = None, total: float | None = None) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Nothing to take away."""


class RichBar:
    """One line that is rewritten in place."""

    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def report(self, text: str, done: float | None = None, total: float | None = None) -> None:
        """Change the text, and the bar where `total` is known."""
        self._bars.update(self._task, description=text, completed=done, total=total)

    def close(self) -> None:
        """Stop drawing and erase the line."""
        self._bars.stop()


@contextmanager
def progress(text: str, total: float | None = None) -> Iterator[Bar]:
    """Show `text` and, if `total` is known, a bar and the time that is left, until the block ends; then the line
    disappears."""
    if not sys.stderr.isatty() or find_spec("rich") is None:  # `doctor` must work without rich
        yield SilentBar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left:"),
               TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield RichBar(bars, bars.add_task(text, total=total))
