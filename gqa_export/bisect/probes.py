"""What is fed to find a fault: rows of token ids of rising complexity, each with a past that may be empty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..bundle.manifest import Manifest

LONGEST = 512


@dataclass(frozen=True)
class Probe:
    """Rows of (past ids, new ids), fed as one step."""

    name: str
    rows: tuple[tuple[np.ndarray, np.ndarray], ...]


def probes(manifest: Manifest) -> list[Probe]:
    """A prompt past every window and second chunk that fits, a decode step, a piece after a past, rows of different
    length."""
    random = np.random.default_rng(23)
    windows = [edge for layer in manifest.spec.layers for edge in layer.edges]
    most = min(manifest.capacity, LONGEST)
    length = min(max([32, *(window + 8 for window in windows if window + 8 < most)]), most - 4)

    def ids(count: int) -> np.ndarray:
        return random.integers(0, manifest.spec.vocabulary, count)

    long, short, none = ids(length), ids(max(1, length // 3)), np.zeros(0, np.int64)
    found = [Probe("prompt", ((none, long),)), Probe("decode", ((long[:-1], long[-1:]),)),
             Probe("piece", ((long[:-3], long[-3:]),)), Probe("ragged prompt", ((none, long), (none, short))),
             Probe("ragged decode", ((long[:-1], long[-1:]), (short[:-1], short[-1:])))]
    if manifest.capacity <= LONGEST and length < manifest.capacity:
        found.append(Probe("whole cache", ((none, ids(manifest.capacity)),)))
    return found
