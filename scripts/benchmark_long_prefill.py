"""The whole prompt of a real model, end to end: SmolLM2-135M in fp32 on one thread, exact and approximate.

    python scripts/benchmark_long_prefill.py --checkpoint MODEL.gguf --scratch FOLDER --out docs/benchmarks
    python scripts/benchmark_long_prefill.py --checkpoint MODEL.gguf --scratch FOLDER --tokens 5120  # print only

Exports a bundle for every choice of layers, opens each as `gqa-export run` does, and reads one random prompt by each in
turn, as often as --runs says: the exact graph (what `--exact` runs) and the graph for long prompts, selection included,
in one process. Seconds of the process, the fastest of the runs. Writes long_prefill.json and long_prefill.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gqa_export.environment.versions import versions
from gqa_export.exporting.long_plan import LongOptions
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.runtime.generate import generate
from gqa_export.runtime.open_session import open_bundle

TOKENS = 8192
CHOICES = ("last:15", "all")
EXACT = "exact"
OPTIONS = LongOptions("tiles")
"""of every bundle but the layers: the defaults"""


def bundles(checkpoint: str, scratch: Path, tokens: int, how: LongOptions = OPTIONS,
            choices: tuple[str, ...] = CHOICES) -> dict[str, Path]:
    """A bundle for every choice of layers, with room for the prompt."""
    made = {}
    for layers in choices:
        folder = scratch / layers.replace(":", "-")
        shutil.rmtree(folder, ignore_errors=True)
        export_onnx(checkpoint, folder, ExportOptions(
            target="ort", dtype="fp32", quantize="dequantize", capacity=tokens, long=replace(how, layers=layers)))
        made[layers] = folder
    return made


def measure(made: dict[str, Path], tokens: int, runs: int) -> dict[str, list[float]]:
    """Process seconds of every run, by choice of layers; the exact graph is that of the first bundle."""
    sessions: dict[str, Any] = {EXACT: open_bundle(next(iter(made.values())), "cpu", threads=1, exact=True)}
    sessions |= {layers: open_bundle(folder, "cpu", threads=1) for layers, folder in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    prompt = np.random.default_rng(0).integers(0, sessions[EXACT].spec.vocabulary, tokens).tolist()
    for name, session in sessions.items():  # opens the graph for long prompts, which is not a part of a prompt's time
        if name != EXACT:
            generate(session, [prompt[: session.manifest.long.plan.from_tokens + 64]], 1)
    for number in range(runs):
        for name, session in sessions.items():
            before = getattr(session, "long_calls", 0)
            start = time.process_time()
            generate(session, [prompt], 1)
            seconds[name].append(round(time.process_time() - start, 2))
            called = getattr(session, "long_calls", 0) - before
            print(f"run {number + 1}: {name}: {seconds[name][-1]} s, {called} calls of the graph for long prompts",
                  flush=True)
            if bool(called) != (name != EXACT):
                raise SystemExit(f"{name}: {called} calls ran the graph for long prompts")
    return seconds


def unmet(result: dict[str, Any]) -> list[str]:
    """Choices of layers by which the prompt is not read faster than by the exact graph."""
    best = {name: min(times) for name, times in result["seconds"].items()}
    return [f"{name}: {seconds} s, exact {best[EXACT]} s" for name, seconds in best.items()
            if name != EXACT and not seconds < best[EXACT]]


def table(result: dict[str, Any]) -> str:
    """The result as a page."""
    best = {name: min(times) for name, times in result["seconds"].items()}
    setting = ", ".join(f"{name} {value}" for name, value in result["setting"].items() if name != "method")
    lines = ["# A whole long prompt on a CPU", "",
             f"SmolLM2-135M in fp32, one thread, a prompt of {result['tokens']} tokens read as `gqa-export run` does: "
             "products, attention, selection, all logits. Seconds of the process, the fastest of "
             f"{len(result['seconds'][EXACT])} runs in turn.", "",
             "Made by `scripts/benchmark_long_prefill.py`.", "",
             "| layers by method tiles | seconds | times as fast as exact |", "|---|---|---|",
             *(f"| {'none: the exact graph' if name == EXACT else name} | {seconds:.1f} | {best[EXACT] / seconds:.2f} |"
               for name, seconds in best.items()), "",
             f"Setting: {setting}; sequences are exact up to {result['from_tokens']} tokens.", "",
             "Versions: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Export, measure, print, and write where --out is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="bundles are written there, 1.3 GB")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    made = bundles(options.checkpoint, options.scratch, options.tokens)
    seconds = measure(made, options.tokens, options.runs)
    plan = open_bundle(made[CHOICES[0]], "cpu").manifest.long.plan
    result = {"tokens": options.tokens, "seconds": seconds, "setting": plan.setting.attributes(),
              "from_tokens": plan.from_tokens, "versions": versions(("onnxruntime", "onnx"), absent="unknown")}
    print(table(result))
    for line in unmet(result):
        print("not faster:", line)
    for folder in made.values():
        shutil.rmtree(folder)
    if options.out:
        (options.out / "long_prefill.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "long_prefill.md").write_text(table(result))


if __name__ == "__main__":
    main()
