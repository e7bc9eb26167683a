"""Random runs of the compiled kernels on the PTX interpreter, against fp64. No GPU is needed.

    python scripts/ptx_sweep.py [--runs N]      -> docs/benchmarks/ptx_sweep.json, .md

Runs are numbered, and number n is always the same run (tests/ptx/cases.py). What is in the file already, of the same
Triton and of kernels that would be compiled to the same code, is not run again: the command can be stopped and started
as often as one likes, and a kernel that changes has its own runs made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import click

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "benchmarks"
NAME = "ptx_sweep"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]
SHAPE = ("heads", "kv_heads", "head", "value_head", "steps", "capacity", "lengths")
OPTIONS = ("window", "softcap", "sinks", "rotary", "interleaved")


def code_of(number: int) -> str:
    """What decides the compiled code of a run's kernels, without compiling: their sources with whatever they call, what
    is compiled in, and the numbers that they are compiled with."""
    from gqa_plugins.grouped_attention.recipes import recipe
    from ptx.attention import variants_of
    from ptx.cases import random_run

    run = random_run(number)
    parts = []
    for name, variant in sorted(variants_of(run).items()):
        one = recipe(variant, run.capability)
        parts.append([name, run.capability, variant.dtype, one.kernel.cache_key, one.arguments, one.constants,
                      one.options])
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


@contextmanager
def unassembled() -> Iterator[None]:
    """Compile as far as PTX: the assembler takes half of the time, and what it makes is not run here. Triton keeps what
    it compiled, so this has a folder of its own."""
    from triton.backends.nvidia.compiler import CUDABackend

    with TemporaryDirectory(prefix="gqa-ptx-") as folder, patch.dict(os.environ, {"TRITON_CACHE_DIR": folder}), \
            patch.object(CUDABackend, "make_cubin", lambda *_: b"not assembled"):
        yield


def describe(number: int) -> dict[str, Any]:
    """The run of this number, without its result."""
    from ptx.cases import random_run

    run = random_run(number)
    found = {"number": number, "capability": run.capability, "kind": run.kind, "dtype": run.case.dtype,
             **{name: getattr(run.case, name) for name in SHAPE}, "programs": run.programs, "has_new": run.has_new,
             **{name: getattr(run.case, name) for name in OPTIONS if getattr(run.case, name)}}
    return json.loads(json.dumps(found))


def run_one(number: int) -> dict[str, Any]:
    """The run of this number and what came out."""
    from ptx.attention import check
    from ptx.cases import random_run
    from ptx.fault import Fault

    began = time.process_time()
    try:
        result = check(random_run(number))
        outcome: dict[str, Any] = {"error": result.error, "allowed": result.allowed, "ok": result.ok}
    except (Fault, AssertionError, NotImplementedError) as wrong:
        outcome = {"ok": False, "fault": f"{type(wrong).__name__}: {wrong}"[:500]}
    seconds = round(time.process_time() - began, 2)
    return {**describe(number), "code": code_of(number), **outcome, "cpu_seconds": seconds}


def read(path: Path) -> dict[str, Any]:
    """The results so far that still hold."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": []}
    facts = {"triton": version("triton"), "torch": version("torch")}
    runs = [run for run in kept["runs"] if run["code"] == code_of(run["number"])]
    return {"date": date.today().isoformat(), **facts, "runs": runs if kept.get("triton") == facts["triton"] else []}


def write(path: Path, results: dict[str, Any]) -> None:
    """One run a line, so that a difference shows which."""
    head = json.dumps({name: value for name, value in results.items() if name != "runs"}, indent=1)
    runs = ",\n".join(f"  {json.dumps(run)}" for run in results["runs"])
    text = f'{head[:-2]},\n "runs": [\n{runs}\n ]\n}}\n'
    scratch = path.with_suffix(".part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def page(results: dict[str, Any]) -> str:
    """The results as Markdown: counts, and whatever is wrong."""
    runs = results["runs"]
    wrong = [run for run in runs if not run["ok"]]
    worst = max((run["error"] / run["allowed"] for run in runs if "error" in run), default=0.0)
    lines = ["# Compiled kernels on the PTX interpreter", "",
             f"{results['date']}, Triton {results['triton']}, torch {results['torch']}, no GPU. Made by "
             "`scripts/ptx_sweep.py`.", "",
             f"{len(runs)} random runs of the whole operator (append, then decode and combine, or prefill), each "
             "through the code that is compiled for one capability: head sizes 1 to 256, groups of 1 to 33 heads, "
             "ragged and empty sequences, full caches, windows, soft caps, sinks, both rotations, NaN in everything "
             f"unspecified. {len(runs) - len(wrong)} are right: no fault of memory or order, error against fp64 at "
             f"most twice that of eager attention. The largest share of the allowed error is {worst:.0%}.", "",
             "| kernel | 8.0 | 8.9 | 9.0 | 12.0 |", "|---|---|---|---|---|"]
    for kind in ("decode", "prefill"):
        for dtype in ("bf16", "fp16", "fp32"):
            counts = Counter(run["capability"] for run in runs if run["kind"] == kind and run["dtype"] == dtype)
            lines.append(f"| {kind} {dtype} | " + " | ".join(str(counts[c]) for c in (80, 89, 90, 120)) + " |")
    lines += ["", *(f"- wrong: number {run['number']}: {run.get('fault', run.get('error'))}" for run in wrong)]
    return "\n".join(lines).rstrip() + "\n"


@click.command()
@click.option("--runs", default=300, show_default=True, help="Run the numbers 0 .. N - 1.")
@click.option("--seconds", default=0.0, help="Stop after about so long; 0: when all are run.")
def main(runs: int, seconds: float) -> None:
    """Run what is not in the file yet; write after each."""
    if os.environ.get("TRITON_INTERPRET"):
        raise click.ClickException("unset TRITON_INTERPRET: kernels are compiled here")
    import torch

    torch.set_num_threads(1)
    path, began = OUT / f"{NAME}.json", time.monotonic()
    results = read(path)
    done = {run["number"] for run in results["runs"]}
    with unassembled():
        for number in range(runs):
            if number in done:
                continue
            if seconds and time.monotonic() - began > seconds:
                break
            one = run_one(number)
            results["runs"] = sorted([*results["runs"], one], key=lambda run: run["number"])
            write(path, results)
            click.echo(f"{number}: {'right' if one['ok'] else one}")
    (OUT / f"{NAME}.md").write_text(page(results), encoding="utf-8")
    if any(not run["ok"] for run in results["runs"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
