"""A bundle that is cut over ranks, as one graph: what is run for it, and the reference with the heads that it has.

The merged graph's cache holds every key/value head as often as ranks hold it. So does the cache of the reference that
it is compared with: each replica is compared with its own head, and an error in one cannot hide behind another.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from .. import graph_io
from ..bundle.manifest import MANIFEST, MODEL, Manifest
from ..bundle.parallel import ParallelFacts
from ..files.scratch import scratch_folder
from ..runtime.session import Session, Step
from ..runtime.tensorrt.ranks import launched_rank
from ..sharding.merge import held_heads_of, merge, merged_spec
from ..spec import ModelSpec
from ..targets import get_target


@contextmanager
def merged_bundle(folder: Path, manifest: Manifest, notes: list[str]) -> Iterator[tuple[Manifest, Path]]:
    """A folder with the merged graph of a bundle's ranks, as a bundle of one graph; its weights are linked.

    Raises:
        InvalidBundle: the collectives of a rank are not those of the others.
    """
    import onnx

    parallel = manifest.parallel
    assert parallel is not None
    model = merge(folder, manifest)
    notes.append(f"the graphs of {len(parallel.ranks)} ranks were run as one, in which a collective is a Sum or Concat "
                 "over the ranks: no transport between devices was run")
    spec, capacity = merged_spec(manifest.spec, parallel), manifest.capacity
    interface = get_target(manifest.target).interface
    with scratch_folder("merged") as place:
        graphs = {f"{rank.folder}/{MODEL}" for rank in parallel.ranks}
        link_files(folder, place, set(manifest.files) - graphs)
        onnx.save(model, str(place / MODEL))
        whole = replace(manifest, parallel=None, spec=spec,
                        inputs=graph_io.graph_inputs(spec, manifest.dtype, manifest.cache, interface, capacity),
                        outputs=graph_io.graph_outputs(spec, manifest.dtype, manifest.cache, manifest.logits, capacity),
                        files={name: fact for name, fact in manifest.files.items() if name not in graphs})
        (place / MANIFEST).write_text(whole.to_json(), encoding="utf-8")
        yield whole, place


def link_files(folder: Path, place: Path, names: Iterable[str]) -> None:
    """Hard links of a bundle's files in another folder; copies where that fails."""
    for name in names:
        source, copy = (folder / name).resolve(), place / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, copy)
        except OSError:
            shutil.copy2(source, copy)  # with its time, which the manifest records


def held_here(manifest: Manifest) -> ParallelFacts | None:
    """The ranks whose heads a bundle's cache has here: all of a merged graph, of an engine this process's own."""
    parallel = manifest.parallel
    if parallel is None or manifest.engine is None:
        return parallel
    return replace(parallel, ranks=(parallel.ranks[launched_rank()],))


def with_held_heads(parallel: ParallelFacts | None, session: Session) -> Session:
    """A session of the whole model with the heads that ranks hold; as it is where nothing is cut."""
    return session if parallel is None else HeldHeads(session, parallel)


class HeldHeads:
    """A session whose keys, values and cache have every head as often as ranks hold it, one rank's behind another's."""

    def __init__(self, session: Session, parallel: ParallelFacts) -> None:
        self._session = session
        held = held_heads_of(parallel)
        self._spec = merged_spec(session.spec, parallel)
        self._heads = [list(held[layer.layer]) for layer in session.spec.owners]

    @property
    def spec(self) -> ModelSpec:
        """With the heads that ranks hold."""
        return self._spec

    @property
    def capacity(self) -> int:
        """As of the session; setting it limits that one."""
        return self._session.capacity

    @capacity.setter
    def capacity(self, tokens: int) -> None:
        """Limit the session."""
        self._session.capacity = tokens  # type: ignore[misc]

    @property
    def lengths(self) -> np.ndarray:
        """As of the session."""
        return self._session.lengths

    def redrawn(self, seed: int) -> AbstractContextManager[None]:
        """See `TorchSession.redrawn`."""
        session: Any = self._session
        return cast("AbstractContextManager[None]", session.redrawn(seed))

    def reset(self, batch: int) -> None:
        """See `Session.reset`."""
        self._session.reset(batch)

    def step(self, input_ids: np.ndarray, new_lengths: np.ndarray | None = None, *, want_cache: bool = False) -> Step:
        """See `Session.step`."""
        step = self._session.step(input_ids, new_lengths, want_cache=want_cache)
        if step.keys is None or step.values is None:
            return step
        return replace(step, keys=self._held(step.keys), values=self._held(step.values))

    def _held(self, arrays: Iterable[np.ndarray]) -> tuple[np.ndarray, ...]:
        # where PyTorch caches something else than keys and values (latents), they are not compared, and stay
        return tuple(array[:, heads] if array.shape[1] > max(heads) else array
                     for array, heads in zip(arrays, self._heads))

    def reset_row(self, row: int) -> None:
        """See `Session.reset_row`."""
        self._session.reset_row(row)

    def rewind_row(self, row: int, length: int) -> None:
        """See `Session.rewind_row`."""
        self._session.rewind_row(row, length)

    def copy_row(self, source: int, destination: int, length: int | None = None) -> None:
        """See `Session.copy_row`."""
        self._session.copy_row(source, destination, length)

    def nearest_length(self, row: int, length: int) -> int:
        """See `Session.nearest_length`."""
        return self._session.nearest_length(row, length)

    def mark_row(self, row: int) -> int:
        """See `Session.mark_row`."""
        return self._session.mark_row(row)

    def states(self) -> list[np.ndarray]:
        """As of the session."""
        return self._session.states()

    def cache(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """See `Session.cache`."""
        pairs = self._session.cache()
        return list(zip(self._held(key for key, _ in pairs), self._held(value for _, value in pairs)))
