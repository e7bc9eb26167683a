"""Texts that end an answer. What could be the beginning of one is held back until it is known."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import GqaExportError


class StopStrings:
    """Watches pieces of a text. Args: stops: texts that end it; none: nothing is held back.

    Attributes:
        found: one of them came.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise GqaExportError("a stop string is empty, which ends every answer before it begins", "--stop",
                                 "give at least one character", code="E-OPTION-STOP")
        self._stops, self._held, self.found = tuple(stops), "", False

    def push(self, piece: str) -> str:
        """The text that is certain to be shown, once `piece` has come."""
        if self.found:
            return ""
        self._held += piece
        places = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.found, shown, self._held = True, self._held[: min(places)], ""
            return shown
        waiting = max((size for stop in self._stops for size in range(1, len(stop))
                       if self._held.endswith(stop[:size])), default=0)
        shown, self._held = self._held[: len(self._held) - waiting], self._held[len(self._held) - waiting:]
        return shown

    def flush(self) -> str:
        """What was held back, at the end of a text in which no stop string came."""
        shown, self._held = self._held, ""
        return shown

    def cut(self, text: str) -> str:
        """A whole text up to the first stop string."""
        return text[: min((place for place in (text.find(stop) for stop in self._stops) if place >= 0),
                          default=len(text))]
