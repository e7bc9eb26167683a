"""A running bundle as the public API hands it out: token ids in, logits out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import GqaExportError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..runtime.session import Session as InnerSession


class Session:
    """A decoder with its KV cache inside. Made by `Bundle.session`; belongs to one thread at a time."""

    def __init__(self, inner: InnerSession) -> None:
        self.inner = inner
        self._hidden: npt.NDArray[np.float32] | None = None

    @property
    def capacity(self) -> int:
        """Tokens that one sequence may reach."""
        return self.inner.capacity

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens in the cache of each sequence, [batch]. A copy."""
        return self.inner.lengths

    def use_adapter(self, name: str | None) -> None:
        """Switch to a LoRA adapter of the bundle, or to none, for all rows. Empties the cache, which was made with
        another.

        Args:
            name: of the adapter, which is that of its folder; None is the base model.

        Raises:
            GqaExportError: the bundle has no adapter of this name, or is an engine.
        """
        switch = getattr(self.inner, "use_adapter", None)
        if switch is None:
            raise GqaExportError("an engine cannot switch between adapters", "use_adapter",
                                 "export the checkpoint with --merge-lora DIR and build an engine of that",
                                 code="E-RUN-ADAPTER")
        switch(name)

    def reset(self, batch: int = 1) -> None:
        """Empty the cache, for `batch` sequences."""
        self.inner.reset(batch)

    def reset_row(self, row: int) -> None:
        """Empty one row, so that another request may begin there; the others stay as they are.

        Args:
            row: 0 .. batch - 1.

        Raises:
            GqaExportError: there is no such row.
        """
        self.inner.reset_row(row)

    def rewind_row(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row and forget the others; nothing is run again.

        Args:
            row: 0 .. batch - 1.
            length: tokens to keep, at most what the row holds. A model with states of fixed size cannot go back but to
                0 and to lengths that `mark_row` has kept. With `window_cache` small a row goes back a prompt chunk and
                one token behind the farthest that it held, or to 0; `nearest_length` tells.

        Raises:
            GqaExportError: there is no such row, it holds fewer tokens, or its states at that length are not known.
        """
        self.inner.rewind_row(row, length)

    def nearest_length(self, row: int, length: int) -> int:
        """The largest length, at most `length`, to which a row can go back.

        Args:
            row: 0 .. batch - 1.
            length: tokens.

        Raises:
            GqaExportError: there is no such row.
        """
        return self.inner.nearest_length(row, length)

    def copy_row(self, source: int, destination: int, length: int | None = None) -> None:
        """Let row `destination` begin with the first `length` tokens of row `source` (None: all of them): a prefix that
        two requests share is read once. Limits and errors as of `rewind_row`."""
        self.inner.copy_row(source, destination, length)

    def mark_row(self, row: int) -> int:
        """Keep the states of a row as they are now, so that it can come back to this length, which is returned. Costs
        nothing where the model has attention alone."""
        return self.inner.mark_row(row)

    def step(self, ids: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
        """Feed new tokens and get their logits.

        Args:
            ids: token ids [batch, new], each row padded on the right. The batch is that of the last `reset`; while the
                cache is empty, a step of another batch size resets it first.
            lengths: how many ids of each row are real, [batch]; None: all of them.

        Returns:
            Logits [batch, new, vocabulary], or [batch, 1, vocabulary] of each row's last real token if the bundle was
            exported so. Rows at and past `lengths` mean nothing.

        Raises:
            GqaExportError: before anything is run, for a row that would pass the capacity, an id outside the
                vocabulary, or shapes that do not fit.
        """
        rows, new = _whole(ids, "ids"), None if lengths is None else _whole(lengths, "lengths")
        if rows.ndim == 2 and len(rows) != len(self.inner.lengths) and not self.inner.lengths.any():
            self.inner.reset(len(rows))
        step = self.inner.step(rows, new)
        self._hidden = step.hidden
        logits: npt.NDArray[np.float32] = step.logits
        return logits

    @property
    def hidden_states(self) -> npt.NDArray[np.float32] | None:
        """The last hidden states [batch, new, hidden size] of the last step, after the final norm: what a head that
        drafts tokens reads (MTP, EAGLE). None before the first step, and where the bundle was exported without
        `hidden_states`. Rows at and past `lengths` mean nothing."""
        return self._hidden

    def cache(self) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        """Of each layer the keys [batch, kv_heads, tokens, head_size] and values [batch, kv_heads, tokens,
        value_head_size]. Of row b, only the first `lengths[b]` tokens mean something."""
        return self.inner.cache()


def _whole(values: npt.ArrayLike, name: str) -> npt.NDArray[np.int64]:
    """Numbers as int64. What is not whole is refused: 1.5 would be fed as 1."""
    import numpy

    try:
        found = numpy.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise GqaExportError(f"{name} do not form an array: {error}", name,
                             "pad each row on the right, and pass lengths", code="E-RUN-IDS") from error
    if found.dtype.kind not in "iu":
        raise GqaExportError(f"{name} have type {found.dtype}, expected whole numbers", name, "pass integers",
                             code="E-RUN-IDS")
    return found.astype(numpy.int64)
