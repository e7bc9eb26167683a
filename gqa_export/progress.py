"""Progress of long work, as a callback: whoever works reports, whoever asked shows it (a bar, a log, nothing)."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float | None, float | None], None]
"""called with what is being done, how much of it is done, and of how much; None where that is not known"""


class Bytes(int):
    """An amount of bytes, done or to be done: whoever shows it can tell how many there are in a second."""


def silent(_text: str, _done: float | None = None, _total: float | None = None) -> None:
    """The callback of a caller that shows nothing."""
