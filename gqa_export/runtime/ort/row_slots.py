"""Rows as slots in ONNX Runtime: how tensors of caches and states are read, and moved for the operations of `RowSlots`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...bundle.manifest import Manifest
from ...quantized.kv_codes import decode
from ...spec import AttentionSpec, KvCache, ModelSpec
from ...targets import Target
from ..rings import unrolled
from ..rows import RowSlots, longest_after, move_row, resized
from .backend import Backend

TOKENS_A_CALL = 16
"""tokens whose products take about as long on a CPU as reading the weights for a call: of SmolLM2 in fp32, one thread
(scripts/benchmark_sessions.py measures what follows from it)"""


BUFFER = 256
"""tokens for which the buffer of a growing cache is made"""


class OrtRowSlots(RowSlots):
    """What `OrtSession` has beside its steps. `_past`: the `_cached` tensors of the cache, then those of states."""

    manifest: Manifest
    spec: ModelSpec
    _backend: Backend
    _target: Target
    _static: bool
    _buffer: int
    first_room = 0
    """tokens of the buffer of a growing cache at first; 0: BUFFER"""
    _cached: int
    _past: list[Any]
    _kv: KvCache | None

    def _room(self, layer: AttentionSpec) -> int:
        """Tokens of a layer's new cache."""
        slots = self._windows.slots(layer) if self._windows else 0
        return slots or self._buffer or (self.capacity if self._static else 0)

    def _make_room(self, tokens: int) -> None:
        """Let the buffer of a growing cache hold so many tokens, or the capacity; what it holds stays."""
        if not self._buffer or min(tokens, self.capacity) <= self._buffer:
            return
        self._buffer = min(self.capacity, max(tokens, 2 * self._buffer))
        for i, tensor in enumerate(self._past[: self._cached]):
            self._past[i] = self._backend.upload(resized(self._backend.download(tensor), self._buffer))

    def states(self) -> list[np.ndarray]:
        """Per state of fixed size [B, *shape], copies."""
        return [np.array(self._backend.download(t)) for t in self._past[self._cached:]]

    def cache(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per layer (key [B, K, T, D], value [B, K, T, E]), copies; T is the capacity of a static cache, the longest
        row where it grows or is a ring, of which displaced tokens are zeros. Numbers."""
        longest = int(self._lengths.max()) if self._buffer else None
        tensors = self._numbers([np.array(self._backend.download(t)[:, :, :longest]) for t in
                                 self._past[: self._cached]])
        if self._windows is not None:
            rings = [bool(self._windows.slots(layer)) for layer in self.spec.owners for _ in range(2)]
            tensors = [unrolled(tensor, self._lengths, self._ends) if ring else tensor
                       for tensor, ring in zip(tensors, rings, strict=True)]
        return list(zip(tensors[0::2], tensors[1::2]))

    def _numbers(self, tensors: list[np.ndarray]) -> list[np.ndarray]:
        """Cache tensors, key and value in turn, as numbers."""
        if self._kv is None:
            return tensors
        scales = [scale for each in self._kv.scales for scale in (each.key, each.value)]
        return [decode(tensor, scale, self._kv.bits) for tensor, scale in zip(tensors, scales, strict=True)]

    def _ridden(self, new: np.ndarray, sequence: int) -> np.ndarray:
        """What each row is fed. Where the attention takes no row without a token, and the others bring one each (or
        chunks, where it takes those), an idle row brings one too, which is written beyond its length and not kept: all
        run in one call. States would keep it, so rows of a model that has them run alone."""
        idle = new == 0
        chunks = sequence > 1 and self._target.chunks_alone
        if not self._target.empty_alone or chunks or self._has_states() or idle.all() or (
                self._lengths[idle] >= self.capacity).any():
            return new
        return np.maximum(new, 1)

    def _padding_costs_more(self, fed: np.ndarray, sequence: int) -> bool:
        """Whether rows that could run together are faster one by one: a call for all reads the weights once, and
        computes padding. Only where the graph takes both ways, and on a CPU."""
        if not self.manifest.ragged_chunks or self._backend.device != "cpu" or not self._lengths.any():
            return False
        return len(fed) * sequence > int(fed.sum()) + TOKENS_A_CALL * (len(fed) - 1)

    def _has_states(self) -> bool:
        return bool(self.spec.states)

    def _states_of(self, row: int) -> list[np.ndarray]:
        return [np.array(self._backend.download(t)[row: row + 1]) for t in self._past[self._cached:]]

    def _keep(self, source: int, destination: int, length: int, states: list[np.ndarray] | None) -> None:
        tokens, clear = longest_after(self._lengths, destination, length), not self._target.nan_tail_safe
        if not self._static or source != destination or clear:
            for i, tensor in enumerate(self._past[: self._cached]):
                whole = self._backend.download(tensor)
                whole = whole if self._static else resized(whole, tokens)
                self._past[i] = self._backend.upload(move_row(whole, source, destination, length, clear))
        for i, state in enumerate(self.spec.states):
            row = np.zeros((1, *state.shape), state.dtype) if states is None else states[i]
            self._past[self._cached + i] = self._put_row(self._past[self._cached + i], destination,
                                                         self._backend.upload(row))

    def _put_row(self, tensor: Any, b: int, row: Any) -> Any:
        """A static buffer with row b replaced."""
        whole = self._backend.download(tensor)
        if not whole.flags.writeable:
            whole = whole.copy()
        whole[b: b + 1] = self._backend.download(row)
        return self._backend.upload(whole)

def as_exported(target: Target, manifest: Manifest) -> Target:
    """The target's row as it is for a graph whose attention is given each row's number of new tokens. Every row brings
    one all the same: none at all could not be told from a mask with all ones first (`Target.whole_row_masks`)."""
    return replace(target, chunks_alone=False) if manifest.ragged_chunks else target
