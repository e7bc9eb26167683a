"""Engines on the GPU at hand: built with every TensorRT that is installed, compared with PyTorch, and timed.

For `scripts/gpu_check.py`. A row tells what happened either way: an engine that cannot be built or opened on this card
has the reason in its note, and nothing is passed that did not run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gqa_export.environment.tensorrt_libraries import SOURCES, is_there
from gqa_export.errors import GqaExportError
from gqa_export.exporting.to_engine import EngineOptions, make_engine
from gqa_export.weights.dtypes import itemsize

ATTENTIONS = ("plugin", "native")
STEPS, WARM_STEPS = 64, 8
DTYPE = "fp16"


def step_ms(folder: Path, length: int) -> float:
    """Median time of a decode step at batch 1, over a cache of `length` tokens, tokens staying on the device."""
    import statistics

    import numpy as np
    import torch

    from gqa_export.runtime.tensorrt.session import EngineSession

    session = EngineSession.load(folder)
    session.reset(1)
    prompt = np.random.default_rng(0).integers(0, session.spec.vocabulary, (1, length))
    session.step(prompt)
    token = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(WARM_STEPS + STEPS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        session.decode(token)
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[WARM_STEPS:])


def is_right(folder: Path, checkpoint: str, level: str) -> tuple[bool, str]:
    """Whether the engine passes against PyTorch, and in a few words by how much."""
    from gqa_export.validation.validate import validate

    verdict = validate(folder, checkpoint, level=level, check_hashes=False)
    return verdict.passed, f"largest difference of logits {verdict.max_abs_logits:.3g}"


def try_engines(checkpoint: str, scratch: Path, copy_gb_s: float, *, quick: bool = False,
                flavors: Iterable[str] = tuple(SOURCES), check: Callable[..., tuple[bool, str]] = is_right,
                clock: Callable[[Path, int], float] = step_ms,
                say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """One row for each installed flavour and kind of attention. passed None: it did not run here, see its note.

    copy_gb_s: measured copy bandwidth, bytes read plus written. of_copy: bytes of weights and cache that a step must
    read, over its time, as a share of that.
    """
    capacity = 256 if quick else 2048
    rows = []
    for flavor in flavors:
        for attention in ATTENTIONS if is_there(flavor) else ():
            row: dict[str, Any] = {"flavor": flavor, "version": "", "attention": attention, "dtype": DTYPE,
                                   "passed": None, "note": "", "build_s": None, "step_ms": None, "tokens_s": None,
                                   "of_copy": None, "length": capacity - STEPS - WARM_STEPS}
            rows.append(row)
            try:
                _try_one(row, checkpoint, scratch / f"{flavor}-{attention}", capacity, copy_gb_s, quick, check, clock)
            except (GqaExportError, RuntimeError, OSError) as error:
                row["note"] = " ".join(str(error).split())[:300]
            say(f"engine {flavor} {attention}: {'did not run' if row['passed'] is None else row['passed']} "
                f"{row['note']}")
    return rows


def _try_one(row: dict[str, Any], checkpoint: str, folder: Path, capacity: int, copy_gb_s: float, quick: bool,
             check: Callable[..., tuple[bool, str]], clock: Callable[[Path, int], float]) -> None:
    capabilities = ("current",)
    build = make_engine(checkpoint, folder, EngineOptions(
        row["attention"], DTYPE, capacity, row["flavor"], capabilities, max_batch=4), lambda *_: None)
    row.update(version=build.facts.version, build_s=build.facts.build["seconds"])
    row["passed"], row["note"] = check(folder, checkpoint, "quick" if quick else "full")
    spec = build.manifest.spec
    cache = spec.cache_bytes_per_token(itemsize(build.manifest.dtype)) * row["length"]
    milliseconds = clock(folder, row["length"])
    read = build.facts.build["weight_bytes_read"] + cache
    row.update(step_ms=milliseconds, tokens_s=1000 / milliseconds, of_copy=read / milliseconds / 1e6 / copy_gb_s)
