"""Caches that are rings: which slots hold which tokens, and what can still be read of a row.

Token t of a row lies in slot t mod N. Dimensions as in `gqa_export.attention_op`; N slots.
"""

from __future__ import annotations

import numpy as np

from ..spec import AttentionSpec, WindowCache


def dead_slots(slots: int, window: int, lengths_B: np.ndarray) -> np.ndarray:
    """bool [B, N]: the slots that no later row reads, because they hold no token or one behind every later window."""
    last_B1 = np.asarray(lengths_B)[:, None] - 1
    held_BN = last_B1 - (last_B1 - np.arange(slots)) % slots
    return (held_BN < 0) | (held_BN <= last_B1 + 1 - window)


def unrolled(ring_BKND: np.ndarray, lengths_B: np.ndarray, ends_B: np.ndarray) -> np.ndarray:
    """[B, K, T, D], T the longest row: token t at index t, zeros where the ring holds it no longer. ends: of what each
    row ever wrote."""
    batch, heads, slots, size = ring_BKND.shape
    whole = np.zeros((batch, heads, int(lengths_B.max()), size), ring_BKND.dtype)
    for b, (length, end) in enumerate(zip(lengths_B.tolist(), ends_B.tolist())):
        there = np.arange(max(0, end - slots), length)
        whole[b][:, there] = ring_BKND[b][:, there % slots]
    return whole


def kept_from(windows: WindowCache, layer: AttentionSpec, lengths_B: np.ndarray, seen: bool = False) -> np.ndarray:
    """int64 [B]: the first token that a layer's cache still holds, of rows that were read once from the beginning.
    seen: the first that a later row sees."""
    slots = windows.slots(layer)
    reach = layer.window - 1 if seen else slots
    return np.maximum(np.asarray(lengths_B) - reach, 0) if slots else np.zeros_like(lengths_B)


def first_length(windows: WindowCache | None, layers: tuple[AttentionSpec, ...], end: int) -> int:
    """The least length, beside 0, to which a row can go back whose rings were written up to token `end` - 1.

    A row of length l sees the tokens from l - window + 1 on, and a ring of window + chunk slots holds those from
    end - window - chunk on: l is at least end - chunk - 1, or nothing was displaced yet.
    """
    if windows is None or end <= min(windows.slots(layer) for layer in layers if windows.slots(layer)):
        return 0
    return end - windows.chunk - 1
