"""An engine bundle as a session: lengths on the host, every refusal before the run, the cache written in place.

Dimensions as in `gqa_export.attention_op`; V vocabulary. The engine answers with the logits of each row's last valid
token alone. A step with more new tokens than the engine takes at once is cut into pieces, each over the cache of the
ones before; a row whose padding could pass the end of a cache that padding is written into runs by itself. """

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...bundle.manifest import Manifest
from ...errors import GqaExportError
from ...graph_io import HIDDEN_STATES
from ...targets import get_target
from ..feeds import check_feed, chunks_of, joined, must_run_alone, written_rows
from ..rings import unrolled
from ..rows import RowSlots
from ..session import Step
from .check import check_bundle, check_device, facts_of, import_flavor


class EngineBackend(Protocol):
    """Runs the engine and owns the memory of the cache, [B, K, C, D] and [B, K, C, E] for every layer; C is a ring's
    slots where it is one."""

    def allocate(self, batch: int) -> None:
        """An empty, zeroed cache for `batch` sequences."""

    def run(self, ids: np.ndarray, past: np.ndarray, new: np.ndarray, row: int) -> Any:
        """One call for rows `row` .. of the cache: ids int32 [b, S], past and new int32 [b]. The logits [b, 1, V], on
        the device, good until the next call."""

    def host(self, logits: Any) -> np.ndarray:
        """Logits as fp32 on the host."""

    def hidden(self, rows: int, tokens: int) -> np.ndarray | None:
        """The hidden states [rows, tokens, X] of the last call as fp32 on the host; None where there are none."""

    def cache(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Copies of every layer's key and value cache as numbers; fp32 where it holds codes or numpy lacks the type."""

    def copy_row(self, source: int, destination: int, length: int) -> None:
        """Overwrite the first `length` tokens of row `destination` with those of row `source`."""

    def clear_row(self, row: int, length: int) -> None:
        """Zero what lies at or beyond `length` in a row."""

    def fill_tail(self, lengths: np.ndarray, values: tuple[float, ...]) -> None:
        """Overwrite what lies at or beyond lengths [B], and what no later row sees of a ring, with `values` in turn."""


class EngineSession(RowSlots):
    """A `Session` over an engine bundle. Make one with `EngineSession.load`."""

    def __init__(self, manifest: Manifest, backend: EngineBackend) -> None:
        facts = facts_of(manifest, "gqa_export.json")
        self.manifest, self.spec, self.capacity = manifest, manifest.spec, manifest.capacity
        self.max_batch, self.max_prompt = facts.max_batch, facts.max_prompt
        self.leaf = manifest.long.plan.setting.leaf if manifest.long else 0
        """pieces of a prompt that end at multiples of this are approximated as the whole would be; 0: none is"""
        self._most = self.max_prompt // self.leaf * self.leaf if self.max_prompt > self.leaf > 0 else self.max_prompt
        self.backend = backend
        target, self._windows = get_target(manifest.target), manifest.window_cache
        self._pads, self._clears = target.writes_padding, not target.nan_tail_safe
        self._gives_hidden = any(fact.name == HIDDEN_STATES for fact in manifest.outputs)
        self._garbage: tuple[float, ...] = ()
        self._last: Any = None
        self.reset(1)

    @classmethod
    def load(cls, folder: Path | str, *, device: int = 0, cuda_graph: bool = True) -> EngineSession:
        """Open an engine bundle.

        Args:
            folder: of the engine bundle.
            device: number of the CUDA device.
            cuda_graph: capture decode steps once per batch size and replay them.

        Raises:
            InvalidBundle: the bundle is damaged, or for another library version, GPU or plugin.
            GqaExportError: another flavour of TensorRT is installed, or the device does not exist.
            NotCheckedHere: there is no GPU here.
        """
        checked = check_bundle(folder)
        check_device(checked.facts, device, str(folder))
        module = import_flavor(checked.facts, str(folder))
        from .device import DeviceBackend, cuda_device

        backend = DeviceBackend(module, Path(folder), checked.manifest, cuda_device(device), cuda_graph)
        return cls(checked.manifest, backend)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [B]."""
        return self._lengths.copy()

    def reset(self, batch: int) -> None:
        """An empty, zeroed cache for `batch` sequences, at most `max_batch`."""
        if not 1 <= batch <= self.max_batch:
            raise GqaExportError(f"the engine takes 1 to {self.max_batch} sequences at once, got {batch}", "batch",
                                 f"feed fewer, or build the engine with --max-batch {max(batch, 1)}",
                                 code="E-RUN-BATCH")
        self._begin_rows(batch)
        self._last = None
        self.backend.allocate(batch)

    def step(self, input_ids: np.ndarray, new_lengths: np.ndarray | None = None, *, want_cache: bool = False) -> Step:
        """See `Session.step`. Logits are [B, 1, V]; zeros for a row that brings nothing."""
        ids, new = check_feed(input_ids, new_lengths, self._lengths, self.capacity, self.spec.vocabulary)
        pieces = chunks_of(ids.shape[1], self._most, new)
        return joined([self._part(ids[:, start:stop], part, want_cache) for start, stop, part in pieces],
                      [part for _, _, part in pieces], True)

    def _part(self, ids: np.ndarray, new: np.ndarray, want_cache: bool) -> Step:
        """As many new tokens per row as the engine takes at once; nothing runs where there are none."""
        before, width = self._lengths.copy(), int(new.max())
        logits = np.zeros((len(new), 1, self.spec.vocabulary), np.float32)
        hidden = np.zeros((*ids.shape, self.spec.hidden_size), np.float32) if self._gives_hidden else None
        if width:
            answer, found = self._piece(ids[:, :width], new)
            logits = np.where((new > 0)[:, None, None], answer, logits)
            if hidden is not None:
                hidden[:, :width] = found
        if not want_cache:
            return Step(logits, hidden=hidden)
        pairs = self.backend.cache()
        keys, values = (tuple(written_rows(pair[place], before, new, ids.shape[1]) for pair in pairs)
                        for place in (0, 1))
        return Step(logits, keys, values, hidden=hidden)

    def decode(self, token_ids: Any) -> Any:
        """One new token for every row, without leaving the device: token_ids int32 [B, 1], where the backend keeps
        its tensors (a torch CUDA tensor), to logits [B, 1, V] there, good until the next call.

        Ids are not looked at, everything else is refused as by `step`.
        """
        one = np.ones(len(self._lengths), np.int64)
        if tuple(token_ids.shape) != (len(one), 1):
            raise GqaExportError(f"token_ids has shape {list(token_ids.shape)}, expected [{len(one)}, 1]", "token_ids",
                                 "pass one new token for every sequence of the batch", code="E-RUN-SHAPE")
        check_feed(np.zeros((len(one), 1), np.int64), one, self._lengths, self.capacity, self.spec.vocabulary)
        self._last = self.backend.run(token_ids, self._lengths.astype(np.int32), one.astype(np.int32), 0)
        self._grow(one)
        return self._last

    @property
    def device_logits(self) -> Any:
        """The logits of the last call [b, 1, V], where the backend keeps its tensors; None before the first."""
        return self._last

    def states(self) -> list[np.ndarray]:
        """None: no target for TensorRT holds layers that keep states of fixed size."""
        return []

    def cache(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per layer (key [B, K, C, D], value [B, K, C, E]), copies; of a ring the longest row, with zeros for what it
        holds no longer."""
        pairs = self.backend.cache()
        if self._windows is None:
            return pairs
        return [(unrolled(key, self._lengths, self._ends), unrolled(value, self._lengths, self._ends))
                if self._windows.slots(layer) else (key, value)
                for layer, (key, value) in zip(self.spec.owners, pairs, strict=True)]

    def fill_garbage(self, values: tuple[float, ...]) -> None:
        """Fill the cache beyond the lengths with these values, in turn, before every later call; (): leave it."""
        self._garbage = values

    def _has_states(self) -> bool:
        return False

    def _keep(self, source: int, destination: int, length: int, states: Any) -> None:
        if source != destination and length:
            self.backend.copy_row(source, destination, length)
        if self._clears:
            self.backend.clear_row(destination, length)

    def _piece(self, ids: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits [B, 1, V] and hidden states of at most `max_prompt` new tokens per row; the lengths move on."""
        if self._garbage:
            self.backend.fill_tail(self._lengths, self._garbage)
        if must_run_alone(self._lengths, new, ids.shape[1], capacity=self.capacity if self._pads else None,
                          chunks_alone=False, empty_alone=False):
            logits = np.zeros((len(new), 1, self.spec.vocabulary), np.float32)
            hidden = np.zeros((*ids.shape, self.spec.hidden_size), np.float32) if self._gives_hidden else None
            for b in np.flatnonzero(new).tolist():
                logits[b], found = self._run(ids[b: b + 1, : new[b]], self._lengths[b: b + 1], new[b: b + 1], b)
                if hidden is not None and found is not None:
                    hidden[b, : new[b]] = found[0]
        else:
            logits, hidden = self._run(ids, self._lengths, new, 0)
        self._grow(new)
        return logits, hidden

    def _run(self, ids: np.ndarray, lengths: np.ndarray, new: np.ndarray,
             row: int) -> tuple[np.ndarray, np.ndarray | None]:
        self._last = self.backend.run(ids.astype(np.int32), lengths.astype(np.int32), new.astype(np.int32), row)
        return self.backend.host(self._last), self.backend.hidden(*ids.shape) if self._gives_hidden else None
