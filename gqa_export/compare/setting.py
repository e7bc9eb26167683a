"""What the builders of the suite's cases know of a bundle, and how large a piece of a prompt may be."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..spec import ModelSpec
from .cases import LOGIT_ELEMENTS, RAGGED_REACH, Case, TokenIds

SCORE_ELEMENTS, LEAST_PIECE = 1 << 23, 64
"""scores of one layer that a piece of a long prompt computes: 64 MiB in fp64, of which eager attention holds two, and
the baseline two of half the size; and tokens that a piece has whatever that comes to"""


@dataclass
class Setting:
    """What the builders look at. windows: those of the manifest and those that the checkpoint's own configuration
    names, and the ends of the first two chunks of positions where attention is in chunks. switch: tokens beyond which
    another rotary table serves (longrope), 0: one table. special: ids that the case `special` feeds. avoided: those
    that random prompts avoid; None is `special`. largest: ids whose embeddings are largest. literal: the capacity is a
    number in the graph. rings: (slots, window) of caches whose slots are used again. whole_row_masks: the bundle takes
    masks that have all ones of a row first. text: ids of a text that the user gave."""

    spec: ModelSpec
    capacity: int
    steps: int
    windows: tuple[int, ...] = ()
    original_positions: int = 0
    switch: int = 0
    special: tuple[int, ...] = ()
    largest: tuple[int, ...] = ()
    sample: np.ndarray | None = None
    text: np.ndarray | None = None
    nan_tail_safe: bool = False
    literal: bool = False
    whole_row_masks: bool = False
    avoided: tuple[int, ...] | None = None
    rings: tuple[tuple[int, int], ...] = ()
    notes: list[str] = field(default_factory=list)
    core: dict[str, Case] = field(default_factory=dict)
    ids: TokenIds = field(init=False)

    def __post_init__(self) -> None:
        self.windows = tuple(sorted({w for w in (*self.windows, *(edge for layer in self.spec.layers
                                                                 for edge in layer.edges)) if 0 < w < self.capacity}))
        self.avoided = self.special if self.avoided is None else self.avoided
        self.ids = TokenIds(self.spec.vocabulary, self.avoided, 21)

    @property
    def chunk(self) -> int:
        """Tokens of one row that are fed at once."""
        return max(16, min(4096, LOGIT_ELEMENTS // max(self.spec.vocabulary, 1)))

    def piece(self, case: Case) -> int:
        """Tokens of one row that a case feeds at once: fewer where each is held against a long past."""
        longest = max(map(len, case.prompts))
        if longest <= RAGGED_REACH:
            return case.chunk
        heads = max((layer.num_heads for layer in self.spec.layers), default=1)
        return min(case.chunk, max(LEAST_PIECE, SCORE_ELEMENTS // (heads * longest)))
