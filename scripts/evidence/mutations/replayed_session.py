"""A session that repeats its answers to earlier feeds from memory: many bundles are compared with one reference, which
is computed once.

The answers of a deterministic decoder depend on what it was fed since the reset, and on nothing else. Everything is
kept, so this is for small models and repeated cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gqa_export.runtime.feeds import check_feed
from gqa_export.runtime.session import Session, Step
from gqa_export.spec import ModelSpec

Key = tuple[bytes, ...]


class ReplayedSession:
    """A `Session` around another. Refusals are never remembered."""

    def __init__(self, session: Session) -> None:
        inner: Any = session
        self._session, self.capacity = inner, session.capacity
        self._steps: dict[Key, Step] = {}
        self._caches: dict[Key, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._states: dict[Key, list[np.ndarray]] = {}
        self._apart: dict[tuple[str, ...], tuple[Any, ...]] = {}
        self._under: tuple[str, ...] = ()
        self._fed: list[tuple[np.ndarray, np.ndarray]] = []
        self._key: Key = ()
        self._done = -1
        self.reset(1)

    @property
    def spec(self) -> ModelSpec:
        """The spec of the session inside."""
        spec: ModelSpec = self._session.spec
        return spec

    @property
    def model(self) -> Any:
        """The module inside."""
        return self._session.model

    @property
    def lengths(self) -> np.ndarray:
        """int64 [B]."""
        return self._lengths.copy()

    @contextmanager
    def redrawn(self, seed: int) -> Iterator[None]:
        """See `TorchSession.redrawn`; what is answered inside is remembered apart."""
        with self._remembered(f"redrawn {seed}"), self._session.redrawn(seed):
            yield

    @contextmanager
    def under(self, mode: Any, name: str) -> Iterator[None]:
        """See `TorchSession.under`; what is answered inside is remembered apart."""
        with self._remembered(name), self._session.under(mode, name):
            yield

    @contextmanager
    def _remembered(self, name: str) -> Iterator[None]:
        before = self._steps, self._caches, self._states, self._under
        self._under = (*self._under, name)
        self._steps, self._caches, self._states = self._apart.setdefault(self._under, ({}, {}, {}))
        self._done = -1
        try:
            yield
        finally:
            self._steps, self._caches, self._states, self._under = before
            self._done = -1

    def reset(self, batch: int) -> None:
        """Start again; nothing is run."""
        self._lengths = np.zeros(batch, np.int64)
        self._fed, self._key, self._done = [], (bytes([batch]),), -1

    def step(self, input_ids: np.ndarray, new_lengths: np.ndarray | None = None, *, want_cache: bool = False) -> Step:
        """See `Session.step`; always with the cache's rows."""
        ids, new = check_feed(input_ids, new_lengths, self._lengths, self.capacity, self._session.vocabulary)
        self._fed.append((ids, new))
        self._key = (*self._key, ids.tobytes(), new.tobytes(), str(ids.shape).encode())
        self._lengths = self._lengths + new
        if self._key not in self._steps:
            self._steps[self._key] = self._catch_up()
        return self._steps[self._key]

    def cache(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """See `Session.cache`."""
        if self._key not in self._caches:
            self._catch_up()
            self._caches[self._key] = self._session.cache()
        return self._caches[self._key]

    def states(self) -> list[np.ndarray]:
        """See `Session.states`."""
        if self._key not in self._states:
            self._catch_up()
            self._states[self._key] = self._session.states()
        return self._states[self._key]

    def _catch_up(self) -> Step:
        """Let the session inside take every step since the reset that it has not taken."""
        if self._done < 0:
            self._session.capacity = max(self._session.capacity, self.capacity)
            self._session.reset(len(self._lengths))
            self._done = 0
        step = Step(np.zeros(0))
        for ids, new in self._fed[self._done:]:
            step = self._session.step(ids, new, want_cache=True)
        if self._done == len(self._fed):
            return self._steps[self._key]
        self._done = len(self._fed)
        return step
