"""Rows of a batch as slots: requests that join and leave one by one, go back, and begin with what another row holds.

This is what a scheduler with continuous batching needs of a session. A row's cache is valid up to its length, and
nothing beyond is ever read; so a row goes back by a smaller length. A state of fixed size is the sum of all that was
read and cannot go back: such a session returns to the lengths that `mark_row` kept the states of. A ring
(`WindowCache`) has room for few tokens behind its window: a row goes back a prompt chunk and one token, or to 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import GqaExportError
from ..spec import ModelSpec, WindowCache
from .rings import first_length


class RowSlots:
    """The row operations of every session here. A session tells how its memory is moved: `_keep` and `_states_of`."""

    capacity: int
    _lengths: np.ndarray
    _marks: list[dict[int, Any]]
    _windows: WindowCache | None = None
    """the layers whose cache is a ring, where there are some"""

    def _begin_rows(self, batch: int) -> None:
        """What a session does in `reset`: all rows empty."""
        self._lengths = np.zeros(batch, dtype=np.int64)
        self._ends = np.zeros(batch, dtype=np.int64)  # of what each row ever wrote: a ring keeps what went back, too
        self._marks = [{} for _ in range(batch)]

    def reset_row(self, row: int) -> None:
        """Empty one row; the others stay as they are.

        Args:
            row: 0 .. batch - 1.

        Raises:
            GqaExportError: there is no such row.
        """
        self.rewind_row(row, 0)

    def rewind_row(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row and forget the others; nothing of it is run again.

        Args:
            row: 0 .. batch - 1.
            length: tokens to keep, at most what the row holds. Where the model keeps states of fixed size: 0, what it
                holds, or a length that was marked by `mark_row`. Where windowed layers keep rings: 0, or at most a
                prompt chunk and one token less than the row ever held.

        Raises:
            GqaExportError: there is no such row, it holds fewer tokens, its states at that length are not known, what
                its windowed layers would see was displaced, or the tokens that stay were rotated for a longer text
                (longrope).
        """
        self.copy_row(row, row, length)

    def copy_row(self, source: int, destination: int, length: int | None = None) -> None:
        """Let a row begin with the first tokens of another: a prefix that both share is read once.

        Args:
            source: the row that is copied, 0 .. batch - 1; it stays as it is.
            destination: the row that is overwritten.
            length: tokens to copy; None: all. Otherwise as of `rewind_row`.

        Raises:
            GqaExportError: as of `rewind_row`.
        """
        self._check_row(source)
        self._check_row(destination)
        held = int(self._lengths[source])
        wanted = held if length is None else length
        if isinstance(wanted, bool) or not isinstance(wanted, (int, np.integer)) or not 0 <= wanted <= held:
            raise GqaExportError(f"row {source} holds {held} tokens, and {wanted} are to be kept", f"row {source}",
                                 f"keep 0 to {held} tokens", code="E-RUN-ROW-LENGTH")
        wanted = int(wanted)
        switch = rope_switch(self)
        if 0 < wanted <= switch < held:
            raise GqaExportError(f"the first {wanted} tokens of row {source} may have been rotated for a text of more "
                                 f"than {switch} tokens, and alone they would not be", f"row {source}: {held} tokens",
                                 "reset the row and feed its tokens again", code="E-RUN-ROW-ROPE")
        least = self._least(source)
        if 0 < wanted < least:
            raise GqaExportError(f"what row {source} would see at {wanted} tokens is no longer there: its windowed "
                                 f"layers keep a window and {self._chunk()} tokens more", f"row {source}: {held} "
                                 "tokens", f"keep 0, or {least} to {held} tokens, or export without --window-cache "
                                 "small", code="E-RUN-ROW-WINDOW")
        marks = self._marks[source]
        states: Any = None
        if self._has_states() and wanted > 0:
            if wanted != held and wanted not in marks:
                raise GqaExportError(f"the states of row {source} at {wanted} tokens are not known: this model keeps "
                                     "states of fixed size, which cannot go back", f"row {source}: {held} tokens",
                                     f"keep one of {sorted({0, *marks, held})} tokens, or call mark_row({source}) "
                                     "when the row has the length to come back to", code="E-RUN-ROW-STATES")
            states = self._states_of(source) if wanted == held else marks[wanted]
        if source == destination and wanted == held:
            return
        self._keep(source, destination, wanted, states)
        self._lengths[destination] = wanted
        self._ends[destination] = self._ends[source] if wanted else 0
        self._marks[destination] = {mark: kept for mark, kept in marks.items() if mark <= wanted}

    def mark_row(self, row: int) -> int:
        """Keep the states of a row as they are now, so that `rewind_row` and `copy_row` can come back to this length.
        Costs the memory of one row's states until the row is reset or goes back beyond; nothing where the model has
        attention alone.

        Args:
            row: 0 .. batch - 1.

        Returns:
            The row's length.

        Raises:
            GqaExportError: there is no such row.
        """
        self._check_row(row)
        length = int(self._lengths[row])
        if self._has_states() and length:
            self._marks[row][length] = self._states_of(row)
        return length

    def nearest_length(self, row: int, length: int) -> int:
        """The largest length, at most `length`, to which a row can go back.

        Args:
            row: 0 .. batch - 1.
            length: wanted.

        Raises:
            GqaExportError: there is no such row.
        """
        self._check_row(row)
        held, switch = int(self._lengths[row]), rope_switch(self)
        if length >= held:
            return held
        if 0 < length <= switch < held:
            return 0
        if length < self._least(row):
            return 0
        if not self._has_states():
            return max(0, length)
        return max((mark for mark in self._marks[row] if self._least(row) <= mark <= length), default=0)

    def _least(self, row: int) -> int:
        """The least length, beside 0, to which a row can go back as far as rings are concerned."""
        session: Any = self
        return first_length(self._windows, session.spec.layers, int(self._ends[row])) if self._windows else 0

    def _chunk(self) -> int:
        return self._windows.chunk if self._windows else 0

    def _grow(self, new: np.ndarray, written: np.ndarray | None = None) -> None:
        """The rows hold `new` tokens more. written: tokens that were written behind their lengths; None: those."""
        self._ends = np.maximum(self._ends, self._lengths + (new if written is None else written))
        self._lengths = self._lengths + new

    def _check_row(self, row: int) -> None:
        batch = len(self._lengths)
        if isinstance(row, bool) or not isinstance(row, (int, np.integer)) or not 0 <= row < batch:
            raise GqaExportError(f"row {row} does not exist: the batch has {batch}", "row",
                                 f"give one of 0 to {batch - 1}, or call reset with a larger batch",
                                 code="E-RUN-ROW")

    def _has_states(self) -> bool:
        """Whether the model keeps states of fixed size."""
        raise NotImplementedError

    def _states_of(self, row: int) -> Any:
        """Copies of a row's states, in the form that `_keep` takes."""
        raise NotImplementedError

    def _keep(self, source: int, destination: int, length: int, states: Any) -> None:
        """Make the first `length` tokens of `source` those of `destination`, which may be the same row; `_lengths`
        are those from before. states: of the row then; None: as of an empty row."""
        raise NotImplementedError


def rope_switch(session: Any) -> int:
    """Tokens beyond which another rotary table serves; 0: one table, or a session made without a spec."""
    try:
        spec: ModelSpec = session.spec
    except GqaExportError:
        return 0
    return getattr(spec, "rope_switch", 0)


def longest_after(lengths: np.ndarray, row: int, length: int) -> int:
    """The longest of all rows once `row` has `length` tokens."""
    return max(length, *(int(n) for b, n in enumerate(lengths.tolist()) if b != row), 0)


def resized(tensor_BKTD: np.ndarray, tokens: int) -> np.ndarray:
    """A growing cache tensor with room for `tokens` tokens, [batch, heads, tokens, size]; a copy."""
    kept = min(tokens, tensor_BKTD.shape[2])
    whole = np.zeros((*tensor_BKTD.shape[:2], tokens, tensor_BKTD.shape[3]), tensor_BKTD.dtype)
    whole[:, :, :kept] = tensor_BKTD[:, :, :kept]
    return whole


def move_row(tensor_BKTD: np.ndarray, source: int, destination: int, length: int, clear: bool) -> np.ndarray:
    """Let row `destination` of a cache tensor begin with `length` tokens of row `source`; in place where the memory may
    be written. clear: zeros follow, for an attention that does not take what lies beyond the length, such as NaN."""
    whole = tensor_BKTD if tensor_BKTD.flags.writeable else tensor_BKTD.copy()
    if source != destination:
        whole[destination, :, :length] = tensor_BKTD[source, :, :length]
    if clear:
        whole[destination, :, length:] = 0
    return whole
