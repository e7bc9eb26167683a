"""Progress on standard error: a bar on a terminal; in a pipe or a log file a line now and then, and none of what is
done by then. Both say how far the work is, how fast it goes where bytes are counted, and what time is left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import IO, Any, Protocol, cast

from ..progress import Bytes

EVERY_S = 30.0
"""seconds between two lines of a log, and before the first"""
LEAST_S = 0.5
"""seconds of a task after which its pace means something"""


class Bar(Protocol):
    """A running task."""

    def report(self, text: str, done: float | None = None, total: float | None = None) -> None:
        """Say what is being done and, where it is known, how much of it (in any unit)."""

    def close(self) -> None:
        """Take the line away now, because something else is printed from here on."""


class Pace:
    """How far the task is that was reported last, and how fast it goes since its first report: what was done by then
    (by an export that was killed, say) took no time of this one. A task with another total is another one."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._total: float | None = None
        self._done = self._first = self._began = self._now = 0.0

    def add(self, done: float | None, total: float | None) -> None:
        """Take a report."""
        self._now = self._clock()
        if done is None or not total:
            self._total = None
            return
        if total != self._total or done < self._done:
            self._total, self._first, self._began = total, float(done), self._now
        self._done = float(done)

    def amount(self) -> str:
        """"1.3 of 13.5 GB, 42 MB/s", "7 of 226" or, of another unit, "12 %"; "" where nothing is known."""
        total, spent = self._total, self._now - self._began
        if total is None:
            return ""
        if not isinstance(total, Bytes):
            return f"{self._done:.0f} of {total}" if isinstance(total, int) else f"{self._done / total:.0%}"
        unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
        words = f"{self._done / unit:.1f} of {total / unit:.1f} {name}"
        if spent <= LEAST_S:
            return words
        pace = (self._done - self._first) / spent / 1e6
        return f"{words}, {pace:,.0f} MB/s" if pace >= 100 else f"{words}, {pace:.3g} MB/s"

    def left(self) -> str:
        """"4 min left"; "" where it is not known."""
        spent, gone = self._now - self._began, self._done - self._first
        if self._total is None or spent < LEAST_S or gone <= 0:
            return ""
        return f"{_duration((self._total - self._done) * spent / gone)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class LogBar:
    """What a pipe or a log file gets: a line every half minute, so nothing of what takes less."""

    def __init__(self, write: Callable[[str], Any], clock: Callable[[], float]) -> None:
        self._write, self._clock, self._pace = write, clock, Pace(clock)
        self._told = clock()

    def report(self, text: str, done: float | None = None, total: float | None = None) -> None:
        """Write a line, if the last one is long ago."""
        self._pace.add(done, total)
        now = self._clock()
        if now - self._told < EVERY_S:
            return
        self._told = now
        known = ", ".join(words for words in (self._pace.amount(), self._pace.left()) if words)
        self._write(f"{text}: {known}\n" if known else f"{text}\n")

    def close(self) -> None:
        """Nothing to take away."""


class RichBar:
    """One line that is rewritten in place."""

    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task, self._pace = bars, task, Pace(time.monotonic)

    def report(self, text: str, done: float | None = None, total: float | None = None) -> None:
        """Change the text, and the bar where `total` is known."""
        self._pace.add(done, total)
        amount = self._pace.amount()
        self._bars.update(self._task, description=f"{text}: {amount}" if amount else text, completed=done, total=total)

    def close(self) -> None:
        """Stop drawing and erase the line."""
        self._bars.stop()


class _Deaf:
    """A stream on which writing does not fail. Where nothing can be told (the reader of a pipe is gone, the disk of a
    log is full, the terminal was closed) the work goes on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write if that can be done."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if that can be done."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tell(text: str) -> None:
    """Write to standard error, if there is one that takes it."""
    if sys.stderr is not None:
        stream = _Deaf(sys.stderr)
        stream.write(text)
        stream.flush()


@contextmanager
def progress(text: str, total: float | None = None) -> Iterator[Bar]:
    """Show `text` and, if `total` is known, a bar and the time that is left, until the block ends; then the line
    disappears. Where standard error is not a terminal, see `LogBar`."""
    if sys.stderr is None or not sys.stderr.isatty() or find_spec("rich") is None:  # `doctor` must work without rich
        yield LogBar(tell, time.monotonic)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left:"),
               TimeRemainingColumn())
    with Progress(*columns, console=Console(file=cast(IO[str], _Deaf(sys.stderr))), transient=True) as bars:
        yield RichBar(bars, bars.add_task(text, total=total))
