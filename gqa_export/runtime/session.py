"""What every runner offers: a decoder with its cache inside, fed with new tokens, answering with logits.

Dimensions as in `gqa_export.attention_op`; V vocabulary, L cache-owning layers. Lengths are kept on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..spec import ModelSpec


@dataclass(frozen=True)
class Step:
    """What one step gave. Rows at or past new_lengths are unspecified and must not be compared.

    logits: [B, S, V] (or [B, 1, V] when the bundle was exported with `--logits last`), fp32 or fp64.
    keys, values: per layer [B, K, S, D] and [B, K, S, E], only the rows written by this step; None if not asked for.
    states: every state of fixed size after the step, [B, *shape], in the order of `spec.states`; None likewise.
    hidden: the last hidden states [B, S, X], after the final norm, fp32 or fp64; None where the bundle does not give
    them (`--hidden-states`).
    """

    logits: np.ndarray
    keys: tuple[np.ndarray, ...] | None = None
    values: tuple[np.ndarray, ...] | None = None
    states: tuple[np.ndarray, ...] | None = None
    hidden: np.ndarray | None = None


class Session(Protocol):
    """A decoder with state. Not thread-safe."""

    @property
    def spec(self) -> ModelSpec:
        """What the decoder is."""

    @property
    def capacity(self) -> int:
        """Tokens that one sequence may reach."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [B]: tokens in the cache, per sequence. A copy: changing it changes nothing."""

    def reset(self, batch: int) -> None:
        """Empty the cache for `batch` sequences."""

    def step(self, input_ids: np.ndarray, new_lengths: np.ndarray | None = None, *, want_cache: bool = False) -> Step:
        """Feed input_ids int64 [B, S], right-padded; new_lengths [B] counts the real ones (default: S).

        Raises GqaExportError, before running anything, when a sequence would exceed the capacity, an id is outside
        the vocabulary, or the shapes do not fit the batch.
        """

    def reset_row(self, row: int) -> None:
        """Empty one row. This and the next three: see `gqa_export.runtime.rows.RowSlots`."""

    def rewind_row(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row."""

    def copy_row(self, source: int, destination: int, length: int | None = None) -> None:
        """Let a row begin with the first tokens of another."""

    def mark_row(self, row: int) -> int:
        """Keep the states of a row, so that it can come back to its present length."""

    def nearest_length(self, row: int, length: int) -> int:
        """The largest length, at most `length`, to which a row can go back."""

    def states(self) -> list[np.ndarray]:
        """Every state of fixed size, [B, *shape], in the order of `spec.states`; copies."""

    def cache(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per layer (key [B, K, T, D], value [B, K, T, E]); only positions below `lengths[b]` are meaningful."""
