"""How fast a bundle loads, reads a prompt and writes, and how much memory that takes."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.graph_file import read_graph
from ..bundle.manifest import read_manifest
from ..engine.weight_bytes import weight_bytes_read
from ..environment.machine import peak_bytes
from ..errors import GqaExportError
from ..progress import Progress, silent
from .generate import generate
from .open_session import open_bundle

MIB = 1 << 20


@dataclass(frozen=True)
class Speed:
    """Times in seconds, rates in tokens per second over all sequences, memory in MiB (None where unknown).

    Rates are medians over the repeats; `prefill` and `decode` hold every repeat. anonymous: memory of this process
    that no file backs, after loading; peak: the most it ever had resident.
    """

    bundle: str
    target: str
    dtype: str
    cache: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    load_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_step_ms: float
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    anonymous_before_mib: float | None
    anonymous_mib: float | None
    peak_mib: float | None
    weight_bytes_per_token: int = 0
    """weights that a decode step reads; 0 for an engine"""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def measure(folder: Path | str, *, prompt_tokens: int, new_tokens: int, batch: int, repeat: int,
            provider: str = "auto", low_memory: bool = False, threads: int = 0, exact: bool = False,
            report: Progress | None = None) -> Speed:
    """Load a bundle and measure how fast it reads and writes.

    End tokens are not honoured: every repeat does the same work. One short run before them is not counted.

    Args:
        folder: of the bundle.
        prompt_tokens: length of the random prompts (seeded). new_tokens: written after each. batch: prompts at once.
        repeat: runs that are counted.
        provider, low_memory, threads, exact: as of `open_bundle`.
        report: called with what is done, how much, of how much.

    Raises:
        GqaExportError: prompt and answer do not fit the bundle's capacity.
        InvalidBundle, NotCheckedHere: as `open_bundle`.
    """
    manifest = read_manifest(folder)
    # the last new token is never fed
    if prompt_tokens + new_tokens - 1 > manifest.capacity:
        raise GqaExportError(f"the cache holds {manifest.capacity} tokens, and {prompt_tokens} prompt and {new_tokens} "
                             "new tokens do not fit", str(folder),
                             "use smaller --prompt-tokens or --new-tokens, or export with a larger --capacity",
                             code="E-RUN-CAPACITY")
    before = anonymous_mib()
    started = time.perf_counter()
    progress = report or silent
    progress("loading", None, None)
    session = open_bundle(folder, provider, low_memory=low_memory, threads=threads, exact=exact)
    load_s = time.perf_counter() - started
    random = np.random.default_rng(0)
    prompts = random.integers(0, manifest.spec.vocabulary, (batch, prompt_tokens)).tolist()
    progress("warming up", None, None)
    generate(session, prompts, min(new_tokens, 2))
    loaded = anonymous_mib()
    results = []
    for number in range(repeat):
        progress(f"run {number + 1} of {repeat}", number, repeat)
        results.append(generate(session, prompts, new_tokens))
    prefill = tuple(result.prefill_tokens_per_s for result in results)
    decode = tuple(result.tokens_per_s for result in results)
    steps = [result.decode_s / result.decode_steps for result in results if result.decode_steps]
    return Speed(str(folder), manifest.target, manifest.dtype, manifest.cache, prompt_tokens, new_tokens, batch,
                 load_s, statistics.median(prefill), statistics.median(decode),
                 1000 * statistics.median(steps) if steps else 0.0, prefill, decode, before, loaded, peak_mib(),
                 0 if manifest.engine else weight_bytes_read(read_graph(Path(folder)), batch))


def anonymous_mib() -> float | None:
    """Resident memory of this process that no file backs, in MiB; None where the system does not tell (not Linux)."""
    import psutil

    memory = psutil.Process().memory_info()
    shared = getattr(memory, "shared", None)
    return None if shared is None else (memory.rss - shared) / MIB


def peak_mib() -> float | None:
    """The most memory this process ever had resident, in MiB; None where it is unknown."""
    return peak_bytes() / MIB or None
