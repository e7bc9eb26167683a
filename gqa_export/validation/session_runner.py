"""Polygraphy runners: any session of ours as a stateful `BaseRunner`, and ORT's calls through `OnnxrtRunner`.

The Comparator copies every output of every step, so a runner keeps its cache inside and shows the logits and the
rows that the step wrote; the whole cache only at the end, when the feed's third flag is set. Outputs, in the order of
computation: layer.{i}.key [B, K, S, D], layer.{i}.value [B, K, S, E], the states of fixed size as they are after the
step, layer.{i}.conv_state [B, C, 1, K-1], layer.{i}.recurrent_state [B, heads * key size, 1, value size],
hidden_states [B, S, X] where the bundle gives them, logits
[B, S, V] (or [B, 1, V], the last valid token),
fed int64 [B, S] (the tokens fed), and at the end cache.{i}.key|value [B, K, longest, D|E]. What belongs to no
token is zero.
"""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from ..bundle.manifest import Manifest
from ..graph_io import ATTENTION_MASK, HIDDEN_STATES, INPUT_IDS, NEW_LENGTHS, PAST_LENGTHS, past_names
from ..runtime.ort.backend import Infer
from ..runtime.ort.loading import open_session
from ..runtime.rings import dead_slots, kept_from
from ..runtime.session import Session, Step
from ..spec import AttentionSpec, ModelSpec, WindowCache
from .bound_outputs import BoundOutputs

NOTHING = np.zeros(0)
TOGETHER = 1 << 22
"""scores of one layer up to which the sessions run at the same time: the memory of more would add up, and such products
keep every core busy by themselves"""


class SessionRunner(BaseRunner):  # type: ignore[misc] # Polygraphy has no types
    """Runs a session. free: feed the session's own best token where the feed's second flag is set. last_only: show only
    the logits of each row's last valid token, as bundles exported with `--logits last` do. single: take the tokens of a
    step one by one. beside: runners that the Comparator calls next, for the same feed: they begin at once, in threads,
    so that some wait for memory while others interpret Python; steps of many scores they take in turn. alike: numbers
    of the layers whose caches are compared, None for all; never the manifest's `cached_alike`, which could switch the
    comparison off. follows: the runner, called before, whose codes of a quantized cache are taken where they are as
    right as its own. windows: rings of the sessions that are compared; of their layers' caches, what a ring holds no
    longer is zero on every side, and with `seen` all that no later row sees. hidden: hidden states are compared where
    the session gives them."""

    def __init__(self, session: Session, name: str, *, free: bool = True, last_only: bool = False,
                 single: bool = False, beside: Sequence[SessionRunner] = (),
                 alike: Collection[int] | None = None, follows: SessionRunner | None = None,
                 windows: Sequence[WindowCache] = (), seen: bool = False, hidden: bool = True) -> None:
        super().__init__(name=name)
        self._session, self._free, self._last_only, self._single = session, free, last_only, single
        self._own = np.zeros(0, np.int64)
        self._beside, self._compared = beside, alike
        self._begun: Future[OrderedDict[str, np.ndarray]] | None = None
        self._follows, self.written, self._followed = follows, Step(NOTHING), False
        if follows is not None:
            follows._followed = True
        self._windows, self._seen, self._hidden = windows, seen, hidden

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes of a feed."""
        meta = TensorMetadata()
        meta.add("input_ids", np.int64, (None, None))
        meta.add("new_lengths", np.int64, (None,))
        meta.add("flags", np.int64, (3,))
        return meta

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        """One step of the session."""
        alone = self._alone(feed_dict)
        for other in reversed(self._beside):  # the bundle first: old and new cache of it are there while it runs
            other.begin(feed_dict, alone)
        begun, self._begun = self._begun, None
        return self._step(feed_dict) if begun is None else begun.result()

    def _alone(self, feed_dict: Mapping[str, np.ndarray]) -> bool:
        """Whether the scores of a step are so many that the sessions take it one after the other. Where one of them
        takes the tokens one by one, it never is: the others are done long before it."""
        reset, *_ = feed_dict["flags"].tolist()
        before = 0 if reset or not self._beside else int(self._session.lengths.max())
        width = feed_dict["input_ids"].shape[1]
        heads = max((layer.num_heads for layer in self._session.spec.layers), default=0)
        return heads * width * (before + width) > TOGETHER and not any(other._single for other in self._beside)

    def begin(self, feed_dict: Mapping[str, np.ndarray], finish: bool = False) -> None:
        """Begin the step that the next `infer` will take. finish: wait for its end."""
        self._begun = _threads().submit(self._step, feed_dict)
        if finish:
            wait((self._begun,))

    def _step(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        began = time.perf_counter()
        ids, counts = feed_dict["input_ids"], feed_dict["new_lengths"]
        reset, free, finish = feed_dict["flags"].tolist()
        if reset:
            self._session.reset(len(ids))
            self._own = np.zeros(len(ids), np.int64)
        elif free and self._free:
            ids = ids.copy()
            ids[:, 0] = np.where(counts > 0, self._own, ids[:, 0])
        if self._follows is not None:
            follow: Any = self._session
            follow.follow(self._follows.written.keys, self._follows.written.values)
        step = self._one_by_one(ids, counts) if self._single else self._session.step(ids, counts, want_cache=True)
        self.written = step if self._followed else Step(NOTHING)
        outputs: OrderedDict[str, np.ndarray] = OrderedDict()
        keys, values = step.keys or (), step.values or ()
        for number, layer in self._alike():
            outputs[f"layer.{layer.layer}.key"] = _blank(keys[number], counts, 2)
            outputs[f"layer.{layer.layer}.value"] = _blank(values[number], counts, 2)
        for state, array in zip(self._session.spec.states, step.states or ()):
            outputs[f"layer.{state.layer}.{state.name}"] = array.reshape(len(array), -1, 1, state.shape[-1])
        if step.hidden is not None and self._hidden:
            outputs[HIDDEN_STATES] = _blank(step.hidden, counts, 1, every=True)
        logits = _blank(step.logits, counts, 1)
        last = logits[np.arange(len(ids)), np.maximum(counts - 1, 0)] if logits.shape[1] > 1 else logits[:, 0]
        self._own = np.where(counts > 0, last.argmax(-1), self._own)
        outputs["logits"] = last[:, None] if self._last_only else logits
        outputs["fed"] = np.where(np.arange(ids.shape[1]) < counts[:, None], ids, 0)
        if finish:
            longest = int(self._session.lengths.max())
            pairs = self._session.cache()
            for number, layer in self._alike():
                for kind, array in zip(("key", "value"), pairs[number]):
                    held = _blank(array[:, :, :longest], self._session.lengths, 2)
                    for windows in self._windows:
                        first_B = kept_from(windows, layer, self._session.lengths, self._seen)
                        held = np.where((np.arange(longest) >= first_B[:, None])[:, None, :, None], held,
                                        np.zeros((), held.dtype))
                    outputs[f"cache.{layer.layer}.{kind}"] = held
        self.inference_time = time.perf_counter() - began
        return outputs

    def _alike(self) -> list[tuple[int, AttentionSpec]]:
        """The layers, numbered, whose caches can be compared: those that PyTorch caches alike."""
        return [pair for pair in enumerate(self._session.spec.owners)
                if self._compared is None or pair[1].layer in self._compared]

    def _one_by_one(self, ids: np.ndarray, counts: np.ndarray) -> Step:
        """The tokens of one step fed singly; the results put together as if they had come at once."""
        steps = [self._session.step(ids[:, s: s + 1], (counts > s).astype(np.int64), want_cache=True)
                 for s in range(ids.shape[1])]
        layers = range(len(steps[0].keys or ()))
        keys, values = (tuple(np.concatenate([(getattr(step, kind) or ())[i] for step in steps], axis=2)
                              for i in layers) for kind in ("keys", "values"))
        hidden = [step.hidden for step in steps if step.hidden is not None]
        return Step(np.concatenate([step.logits for step in steps], axis=1), keys, values, steps[-1].states,
                    np.concatenate(hidden, axis=1) if hidden else None)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="gqa-export-beside")


def _blank(array: np.ndarray, counts_B: np.ndarray, axis: int, every: bool = False) -> np.ndarray:
    """Zero what lies at or past each row's count along `axis`; the array itself where there is nothing to zero. every:
    there is an entry for each token, never for the last alone."""
    width = array.shape[axis]
    if width == 1 and axis == 1 and not every:
        keep = counts_B[:, None] > 0  # one row of logits belongs to the last valid token, whatever its number
    else:
        keep = np.arange(width) < counts_B[:, None]
    if keep.all():
        return array
    keep = keep.reshape(len(array), *[1] * (axis - 1), width, *[1] * (array.ndim - axis - 1))
    return np.where(keep, array, np.zeros((), array.dtype))


@contextmanager
def onnxrt_infer(folder: Path, manifest: Manifest, provider: str, threads: int = 0,
                 config: Mapping[str, str] | None = None, opened: list[Any] | None = None) -> Iterator[Infer]:
    """Yield a callable feed -> outputs that runs a bundle's graph through Polygraphy's own ONNX Runtime runner.

    ONNX Runtime's threads do not spin between calls here: PyTorch wants the same cores in turn (a tiny model is
    compared several times faster). config: further session options. opened: takes the session of ONNX Runtime.
    Raises what `open_session` raises.
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner

    def open_it() -> Any:
        session = open_session(folder, manifest, provider, threads=threads,
                               config={"session.intra_op.allow_spinning": "0", **(config or {})})
        if opened is not None:
            opened.append(session)
        return BoundOutputs(session) if provider == "cpu" else session

    # The runner opens it and lets it go: at the end no file of the folder is mapped, and Windows can remove it.
    with OnnxrtRunner(open_it, name="onnxrt") as runner:

        def infer(feed: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            outputs: Mapping[str, np.ndarray] = runner.infer(OrderedDict(feed), check_inputs=False)
            return outputs

        yield infer


def garbage(values: tuple[float, ...], dtype: np.dtype) -> np.ndarray:
    """The values in this format; of codes, which cannot be that large, the largest and the least."""
    if np.issubdtype(dtype, np.integer):
        return np.array([np.iinfo(dtype).max, np.iinfo(dtype).min], dtype)
    return np.array(values, dtype)


class GarbageTail:
    """Wraps an `infer`: whatever the cache holds beyond the valid tokens is replaced by the values of `fill`, in turn
    (none: left as it is), and the ids of padding by the last one of the vocabulary. windows: in their layers' rings,
    what lies behind every later window is replaced."""

    def __init__(self, infer: Infer, spec: ModelSpec, windows: WindowCache | None = None) -> None:
        self._infer, self._spec, self._windows = infer, spec, windows
        self._values: tuple[float, ...] = ()

    def fill(self, values: tuple[float, ...]) -> None:
        """From now on, fill with these."""
        self._values = values

    def __call__(self, feed: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if not self._values:
            return self._infer(feed)
        feed = dict(feed)
        if PAST_LENGTHS in feed:
            lengths_B = feed[PAST_LENGTHS]
        else:
            past = feed[ATTENTION_MASK].shape[1] - feed[INPUT_IDS].shape[1]
            lengths_B = feed[ATTENTION_MASK][:, :past].sum(1)
        ids = feed[INPUT_IDS]
        new_B = feed[NEW_LENGTHS] if NEW_LENGTHS in feed else feed[ATTENTION_MASK][:, -ids.shape[1]:].sum(1)
        padded_BS = np.arange(ids.shape[1]) >= np.asarray(new_B)[:, None]
        feed[INPUT_IDS] = np.where(padded_BS, self._spec.vocabulary - 1, ids).astype(ids.dtype)
        for layer in self._spec.owners:
            for name in past_names(layer.layer):
                past_BKPD = feed[name]
                positions_P = np.arange(past_BKPD.shape[2])
                garbage_P = np.resize(garbage(self._values, past_BKPD.dtype), len(positions_P))
                slots = self._windows.slots(layer) if self._windows else 0
                tail_BP = (dead_slots(slots, layer.window, np.asarray(lengths_B)) if slots
                           else positions_P >= lengths_B[:, None])
                feed[name] = np.where(tail_BP[:, None, :, None], garbage_P[None, None, :, None], past_BKPD)
        return self._infer(feed)
