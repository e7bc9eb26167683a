"""A bundle in ONNX Runtime, with its cache inside: targets `ort`, `onnx` and `portable`, growing and static.

Dimensions as in `gqa_export.attention_op`. The cache is compact: token t of sequence b lies at index t. A growing cache
is fed with P = the longest sequence so far and cut back to that after a step, so that no holes accumulate. A static
one is a single zeroed buffer; where the target's attention writes in place it serves as past and as present. On a CPU
such an attention takes a growing bundle's cache the same way, in a buffer that doubles: its nodes are those of a static
bundle, and copying the cache at every step costs more than attending to it. States of fixed size, which begin as zeros,
are read from one tensor and written to another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.integrity import check_files
from ...bundle.long_facts import PREFILL
from ...bundle.manifest import MODEL, Manifest, read_manifest
from ...errors import GqaExportError, cause_of
from ...graph_io import ATTENTION_MASK, HIDDEN_STATES, INPUT_IDS, past_names, past_state, present_names, present_state
from ...spec import DTYPES
from ...targets import Target, get_target
from ..feeds import check_feed, chunks_of, joined, must_run_alone, step_feed, written_rows
from ..session import Step
from .adapters import adapter_names, load_adapter
from .backend import ArrayBackend, Backend, BindingBackend, Infer, numpy_dtype
from .loading import check_graph, choose_provider, graph_facts, open_session
from .row_slots import BUFFER, OrtRowSlots, as_exported


@dataclass(frozen=True)
class _Ran:
    """One call of a graph: logits [b, s, V], the present tensors and, where the graph gives them, hidden states
    [b, s, X]. inplace: the presents are the memory of the pasts."""

    logits: np.ndarray
    present: list[Any]
    hidden: np.ndarray | None
    inplace: bool = False


class OrtSession(OrtRowSlots):
    """A `Session` over a bundle. Make one with `OrtSession.load`.

    Attributes:
        whole_row_masks: send masks whose ones come first in the whole row, as onnxruntime-genai's Engine does, to a
            target that takes both kinds (`Target.whole_row_masks`): the suite compares both.
        long_calls: how many calls ran the graph for long prompts. buffered: a growing cache lies in a buffer.
    """

    def __init__(self, manifest: Manifest, backend: Backend, target: Target, capacity: int,
                 open_long: Callable[[], Backend] | None = None, folder: Path = Path()) -> None:
        self.manifest, self.spec, self.capacity = manifest, manifest.spec, capacity
        self._gives_hidden = any(fact.name == HIDDEN_STATES for fact in manifest.outputs)
        self._plan = manifest.long.plan if manifest.long and open_long else None
        self._open_long = open_long
        self._long: Backend | None = None
        self._backend, self._target, self.whole_row_masks = backend, as_exported(target, manifest), False
        self._folder, self._adapter, self.long_calls = folder, "", 0
        self._windows, self._cached = manifest.window_cache, 2 * len(manifest.spec.owners)
        writes = target.writes_in_place(manifest.fallbacks)
        # as onnxruntime-genai does with any bundle of these targets, whose nodes are the same for both kinds of cache
        self.buffered = (writes and target.genai and manifest.cache == "growing" and self._windows is None
                         and self._plan is None and isinstance(backend, BindingBackend) and backend.device == "cpu"
                         and 2 * len(manifest.spec.layers) == self._cached)
        self._static = manifest.cache == "static" or self.buffered
        self._inplace = self._static and writes
        self._dtype = numpy_dtype(DTYPES.get(manifest.dtype, manifest.dtype))
        self._kv, self._cache_dtype = manifest.kv_cache, np.dtype(getattr(manifest.kv_cache, "dtype", self._dtype))
        self.reset(1)

    @classmethod
    def load(cls, folder: Path | str, provider: str = "auto", *, infer: Infer | None = None,
             capacity: int | None = None, low_memory: bool = False, threads: int = 0,
             config: dict[str, str] | None = None, target: Target | None = None,
             approximate: bool = False, opened: Any = None) -> OrtSession:
        """Open a bundle.

        Args:
            folder: of the bundle. provider: "auto", "cpu" or "cuda".
            infer: runs the graph (dict of arrays in, dict of arrays out) in place of a session of ONNX Runtime.
            capacity: tokens per sequence, at most the bundle's; None is the bundle's.
            low_memory, threads, config: see `gqa_export.runtime.ort.loading.open_session`.
            target: another row of the table than the manifest's (`gqa_export.targets.on_cpu`).
            approximate: run long prompts by the bundle's graph for them, where it has one and it pays.
            opened: a session of ONNX Runtime that has this bundle's graph; None opens one.

        Raises:
            InvalidBundle: the bundle is damaged, or its graph is not the manifest's.
            NotCheckedHere: this machine cannot run it.
            GqaExportError: the bundle's target does not run in ONNX Runtime, or the capacity is too large.
        """
        manifest = read_manifest(folder)
        target = target or get_target(manifest.target)
        if not target.runs_in_onnxruntime:
            raise GqaExportError(f"a bundle of target {manifest.target} does not run in ONNX Runtime", str(folder),
                                 "build an engine of it with `gqa-export trt`, or export it with --target ort, onnx or "
                                 "portable to run it here", code="E-RUN-TARGET")
        capacity = manifest.capacity if capacity is None else capacity
        if not 1 <= capacity <= manifest.capacity:
            raise GqaExportError(f"capacity must be within 1..{manifest.capacity}, got {capacity}", str(folder),
                                 "the bundle's own capacity is the limit: export with a larger --capacity",
                                 code="E-OPTION-CAPACITY")
        spec = manifest.spec
        pasts = [name for layer in spec.owners for name in past_names(layer.layer)] + list(map(past_state, spec.states))
        presents = [name for layer in spec.owners for name in present_names(layer.layer)]
        presents += map(present_state, spec.states)
        dtype = DTYPES.get(manifest.dtype, manifest.dtype)
        element = dtype if manifest.kv_cache is None else manifest.kv_cache.dtype
        hidden = any(fact.name == HIDDEN_STATES for fact in manifest.outputs)
        backend: Backend
        open_long: Callable[[], Backend] | None = None
        if infer is None:
            provider = choose_provider(provider, dtype, target.dtypes)
            session = opened or open_session(folder, manifest, provider, low_memory=low_memory, threads=threads,
                                             config=config)
            backend = BindingBackend(session, provider, element, pasts, presents, len(spec.states), hidden)
            if approximate and manifest.long:
                def open_long() -> Backend:
                    long = open_session(folder, manifest, provider, low_memory=low_memory, threads=threads,
                                        config=config, graph=PREFILL)
                    return BindingBackend(long, provider, element, pasts, presents, len(spec.states), hidden)
        else:
            check_files(Path(folder), manifest, hashes=False)
            check_graph(manifest, *graph_facts(Path(folder) / MODEL), str(Path(folder) / MODEL))
            backend = ArrayBackend(infer, pasts, presents, len(spec.states), hidden)
        return cls(manifest, backend, target, capacity, open_long, Path(folder))

    @property
    def leaf(self) -> int:
        """Pieces of a prompt that end at multiples of this are approximated as the whole would be; 0: none is."""
        return self._plan.setting.leaf if self._plan else 0

    @property
    def lengths(self) -> np.ndarray:
        """int64 [B]."""
        return self._lengths.copy()

    @property
    def adapters(self) -> list[str]:
        """Names of the bundle's adapters."""
        return adapter_names(self.manifest.files)

    @property
    def adapter(self) -> str:
        """Name of the adapter in use; "" for none."""
        return self._adapter

    def use_adapter(self, name: str | None) -> None:
        """Switch to an adapter, or to none, for all rows; the cache is emptied, because it was made with another.

        Raises:
            GqaExportError: the bundle has no adapter of this name.
            InvalidBundle: its file cannot be read.
        """
        self._backend.use(None if name is None else load_adapter(self._folder, self.manifest.files, name))
        self._adapter = name or ""
        self.reset(len(self._lengths))

    def reset(self, batch: int) -> None:
        """An empty cache for `batch` sequences; a static buffer is made anew, zeroed."""
        if batch < 1:
            raise GqaExportError(f"batch size must be at least 1, got {batch}", "reset", "give at least one sequence",
                                 code="E-RUN-BATCH")
        self._begin_rows(batch)
        self._buffer = min(self.capacity, self.first_room or BUFFER) if self.buffered else 0
        width = self._kv.width if self._kv else int
        self._past = [self._backend.upload(np.zeros((batch, layer.kv_num_heads, self._room(layer), width(size)),
                                                    self._cache_dtype))
                      for layer in self.spec.owners for size in (layer.head_size, layer.value_head_size)]
        self._past += [self._backend.upload(np.zeros((batch, *state.shape), state.dtype)) for state in self.spec.states]

    def step(self, input_ids: np.ndarray, new_lengths: np.ndarray | None = None, *, want_cache: bool = False) -> Step:
        """See `Session.step`."""
        ids, new = check_feed(input_ids, new_lengths, self._lengths, self.capacity, self.spec.vocabulary)
        if self._windows is None or ids.shape[1] <= self._windows.chunk:
            return self._piece(ids, new, want_cache, new_lengths is None)
        pieces = chunks_of(ids.shape[1], self._windows.chunk, new)
        return joined([self._piece(ids[:, start:stop], part, want_cache, new_lengths is None)
                       for start, stop, part in pieces], [part for _, _, part in pieces],
                      self.manifest.logits == "last")

    def _piece(self, ids: np.ndarray, new: np.ndarray, want_cache: bool, even: bool) -> Step:
        """One call of the graph, or one for each row. ids, new: checked. even: no row is padded."""
        before, sequence = self._lengths, ids.shape[1]
        padded = self._target.writes_padding and (self._static or self.manifest.ragged_chunks)
        fed = new if even else self._ridden(new, sequence)
        self._make_room(int(before.max()) + sequence)
        alone = must_run_alone(before, fed, sequence, capacity=(self._buffer or self.capacity) if padded else None,
                               chunks_alone=self._target.chunks_alone, empty_alone=self._target.empty_alone)
        alone = alone or self._padding_costs_more(fed, sequence)
        # all ones first do not tell how many of several columns over a past are new
        alone = alone or (self.whole_row_masks and sequence > 1 and len(new) > 1 and bool(before.any()))
        answers = self._each_row(ids, new) if alone else self._whole(ids, fed, new)
        self._grow(new, fed)
        logits, hidden = (each if each is None or each.dtype == np.float32 else each.astype(np.float32)
                          for each in answers)
        assert logits is not None
        if not want_cache:
            return Step(logits, hidden=hidden)
        tensors = self._numbers([written_rows(self._backend.download(t), before, new, sequence)
                                 for t in self._past[: self._cached]])
        return Step(logits, tuple(tensors[0::2]), tuple(tensors[1::2]), tuple(self.states()), hidden)

    def left_padded(self) -> np.ndarray | None:
        """What the graph itself answers to a row padded on the left, [1, 3, V]: NaN if it is sound. None where the
        graph takes no mask. Our own runners refuse such a row before it gets here."""
        if self._target.interface != "mask":
            return None
        self.reset(1)
        feed = {INPUT_IDS: np.zeros((1, 3), np.int64), ATTENTION_MASK: np.array([[0, 1, 1]])}
        logits = _Ran(*self._backend.run(feed, self._past, self._inplace)).logits
        self.reset(1)
        return logits.astype(np.float32)

    def _whole(self, ids: np.ndarray, fed: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits and hidden states of one call for all rows, which bring `fed` tokens, of which `new` are kept."""
        longest = max(self._lengths.tolist())
        ran = self._call(ids, self._lengths, fed, longest, self._past)
        self._past = ran.present
        if not self._static and (after := int((self._lengths + new).max())) < longest + ids.shape[1]:
            # ragged rows leave columns without a token: cut them, or they grow with every step
            self._past[: self._cached] = [self._backend.upload(self._backend.download(t)[:, :, :after])
                                          for t in self._past[: self._cached]]
        if fed is new or (fed == new).all():
            return ran.logits, ran.hidden
        kept = (new > 0)[:, None, None]
        return np.where(kept, ran.logits, 0), None if ran.hidden is None else np.where(kept, ran.hidden, 0)

    def _call(self, ids: np.ndarray, lengths: np.ndarray, new: np.ndarray, past: int, tensors: Sequence[Any]) -> _Ran:
        feed = step_feed(self._target.interface, ids, lengths, new, past, whole_row=self.whole_row_masks)
        long = self._plan is not None and not self._adapter and self._plan.pays(ids.shape[1], past)
        inplace = self._inplace and not long  # the graph for long prompts reads a past while it writes a present
        backend = self._long_backend() if long else self._backend
        try:
            ran = _Ran(*backend.run(feed, tensors, inplace), inplace=inplace)
            self.long_calls += long
            return ran
        except (GqaExportError, MemoryError):
            raise
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            raise GqaExportError(f"ONNX Runtime failed while running the graph: {cause_of(error)}",
                                 f"{len(ids)} sequences, {ids.shape[1]} new tokens, {past} past",
                                 "validate the bundle; if it passes, report this message",
                                 code="E-RUN-FAILED") from error

    def _long_backend(self) -> Backend:
        """The graph for long prompts, opened when the first one comes: it prepares the weights once more."""
        if self._long is None:
            assert self._open_long is not None
            self._long = self._open_long()
        return self._long

    def _each_row(self, ids: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """One call per row that brings something, unpadded; the results put together as if it had been one."""
        ran: dict[int, _Ran] = {}
        for b, count in enumerate(new.tolist()):
            if count:
                length = int(self._lengths[b])
                past = [self._row(tensor, b, length) for tensor in self._past[: self._cached]]
                past += [self._backend.row(tensor, b) for tensor in self._past[self._cached:]]
                ran[b] = self._call(ids[b: b + 1, :count], self._lengths[b: b + 1], new[b: b + 1], length, past)
                if self._static and not ran[b].inplace:
                    self._past[: self._cached] = [self._put_row(tensor, b, row) for tensor, row in
                                                  zip(self._past[: self._cached], ran[b].present)]
        if not self._static:
            after = int((self._lengths + new).max())
            self._past[: self._cached] = [self._gather(i, ran, after) for i in range(self._cached)]
        for i in range(self._cached, len(self._past)):
            for b, row in ran.items():
                self._past[i] = self._put_row(self._past[i], b, row.present[i])
        width = ids.shape[1] if self.manifest.logits == "all" else 1
        hidden = {b: row.hidden[0] for b, row in ran.items() if row.hidden is not None}
        return self._joined({b: row.logits[0] for b, row in ran.items()}, len(new), width, self.spec.vocabulary), (
            self._joined(hidden, len(new), ids.shape[1], self.spec.hidden_size) if self._gives_hidden else None)

    def _row(self, tensor: Any, b: int, length: int) -> Any:
        if self._static:
            return self._backend.row(tensor, b)
        return self._backend.upload(np.ascontiguousarray(self._backend.download(tensor)[b: b + 1, :, :length]))

    def _gather(self, i: int, ran: dict[int, _Ran], length: int) -> Any:
        """The growing tensor number i, [B, K, length, D], from the rows that ran and those that did not."""
        old = self._backend.download(self._past[i])
        whole = np.zeros((*old.shape[:2], length, old.shape[3]), old.dtype)
        for b, valid in enumerate(self._lengths.tolist()):
            row = self._backend.download(ran[b].present[i])[0] if b in ran else old[b, :, :valid]
            whole[b, :, : row.shape[1]] = row[:, :length]
        return self._backend.upload(whole)

    def _joined(self, rows: dict[int, np.ndarray], batch: int, width: int, size: int) -> np.ndarray:
        """[batch, width, size] of the rows that there are, zeros elsewhere."""
        whole = np.zeros((batch, width, size), self._dtype)
        for b, row in rows.items():
            whole[b, : len(row)] = row
        return whole
