"""Decode speed of a bundle against onnxruntime-genai's own export of the same checkpoint, step by step in turn.

    python scripts/benchmark_decode.py --bundle BUNDLE --checkpoint FOLDER [--peer FOLDER] --out DIR

Without --peer the model is made by the builder in onnxruntime-genai. Writes decode.json and decode.md into --out.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
from evidence.raw_decode_loop import Timing, interleave

from gqa_export.bundle.manifest import MODEL, read_manifest
from gqa_export.errors import GqaExportError

OURS, PEER = "gqa-export", "onnxruntime-genai builder"


def build_peer(checkpoint: Path, folder: Path) -> None:
    """Export `checkpoint` with the peer's builder: fp32, CPU."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(folder),
               "-p", "fp32", "-e", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GqaExportError(f"the peer's builder failed: {done.stderr.strip().splitlines()[-1]}", str(checkpoint),
                             "it needs a Hugging Face folder with a tokenizer, not a GGUF file")


def row(timing: Timing) -> dict[str, object]:
    """One graph's figures."""
    quarter = statistics.quantiles(timing.steps_ms, n=4)
    return {"name": timing.name, "nodes": timing.nodes, "load_s": round(timing.load_s, 2),
            "prefill_ms": round(timing.prefill_ms, 1), "median_step_ms": round(timing.median_ms, 2),
            "quartiles_ms": [round(quarter[0], 2), round(quarter[2], 2)],
            "best_step_ms": round(min(timing.steps_ms), 2), "tokens_per_s": round(timing.tokens_per_s, 2)}


def markdown(result: dict) -> str:
    """The figures as a table with a sentence on how they came about."""
    lines = [f"# Decode speed: {result['model']}", "",
             f"{result['steps']} greedy decode steps after a prompt of {result['prompt_tokens']} tokens, fp32, "
             f"batch 1, {result['threads'] or 'all'} threads of {result['machine']}; one step of each graph in turn, "
             "in one process, past and present sharing a buffer. ONNX Runtime " + result["onnxruntime"] + ".", "",
             "| graph | nodes | load s | prefill ms | median step ms (quartiles) | best | tokens/s |",
             "|---|---|---|---|---|---|---|"]
    for r in result["graphs"]:
        low, high = r["quartiles_ms"]
        lines.append(f"| {r['name']} | {r['nodes']} | {r['load_s']} | {r['prefill_ms']} | {r['median_step_ms']} "
                     f"({low} - {high}) | {r['best_step_ms']} | {r['tokens_per_s']} |")
    lines += ["", f"Speed of {OURS} / speed of {PEER}: **{result['ratio']:.3f}** (medians; "
              f"{result['ratio_best']:.3f} from the best steps; median over pairs of steps "
              f"{result['ratio_pairs']:.3f}). Same tokens: {'yes' if result['same_tokens'] else 'no'}.", ""]
    return "\n".join(lines)


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), required=True, help="Ours; target ort, fp32.")
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="What it was made from.")
@click.option("--peer", type=click.Path(path_type=Path, exists=True), help="The peer's export, if already made.")
@click.option("--prompt-tokens", type=int, default=64, show_default=True)
@click.option("--steps", type=int, default=256, show_default=True)
@click.option("--threads", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(bundle: Path, checkpoint: Path | None, peer: Path | None, prompt_tokens: int, steps: int, threads: int,
         out: Path) -> None:
    """Measure, print and write the comparison."""
    manifest = read_manifest(bundle)
    spec = manifest.spec
    prompt = np.random.default_rng(0).integers(0, spec.vocabulary, prompt_tokens).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        if peer is None:
            if checkpoint is None:
                raise click.UsageError("give --checkpoint or --peer")
            peer = Path(scratch) / "peer"
            build_peer(checkpoint, peer)
        head = spec.layers[0].head_size
        timings = interleave({OURS: (bundle / MODEL, head), PEER: (peer / MODEL, head)}, prompt, steps,
                             threads=threads)
    ours, theirs = timings
    result = {
        "model": f"{spec.architecture}, {len(spec.layers)} layers, hidden size {spec.hidden_size}, "
                 f"weights {manifest.weights}",
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "onnxruntime": version("onnxruntime"), "onnxruntime_genai": version("onnxruntime-genai"),
        "prompt_tokens": prompt_tokens, "steps": steps, "threads": threads,
        "graphs": [row(ours), row(theirs)],
        "ratio": theirs.median_ms / ours.median_ms,
        "ratio_best": min(theirs.steps_ms) / min(ours.steps_ms),
        "ratio_pairs": statistics.median(b / a for a, b in zip(ours.steps_ms, theirs.steps_ms)),
        "same_tokens": ours.tokens == theirs.tokens,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "decode.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "decode.md").write_text(markdown(result), encoding="utf-8")
    click.echo(markdown(result))


if __name__ == "__main__":
    try:
        main()
    except GqaExportError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
