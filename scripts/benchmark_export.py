"""What `gqa-export onnx` costs beside other exporters: wall time, CPU time and peak memory of whole processes.

    python scripts/benchmark_export.py --checkpoint HF_FOLDER --mobius PYTHON --out docs/benchmarks

One process per run, no validation, in turn: weights copied and weights linked without a trace cache, linked again with
the trace kept, and two peers on the same checkpoint: the model builder of onnxruntime-genai, and mobius if `--mobius`
names the interpreter of an environment that has it. `evidence.whole_process` says what makes the comparison fair.
Then as many exports of ours, each in one process, whose CPU time is divided into phases (`evidence.export_phases`).
Writes export.json and export.md.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import onnx
from evidence.export_phases import phases, table
from evidence.whole_process import FIGURES, Program, compare, median

from gqa_export.bundle.manifest import read_manifest

GENAI, MOBIUS = "onnxruntime-genai builder", "mobius"
COPY, LINK, HIT = "copy", "link", "link, trace kept"
VERSIONS = ("torch", "transformers", "onnxscript", "onnxruntime", "onnxruntime-genai")
ROOT = Path(__file__).parent.parent


def programs(checkpoint: Path, scratch: Path, mobius: str) -> dict[str, Program]:
    """The exports to time; run N of way W writes into scratch/W/N, of which only the last is left."""
    def folder(way: str, number: int) -> str:
        shutil.rmtree(scratch / way, ignore_errors=True)
        return str(scratch / way / str(number))

    def ours(way: str) -> Program:
        return Program(lambda number: [sys.executable, "-m", "gqa_export", "onnx", str(checkpoint), "-o",
                                       folder(way, number), "--no-validate", "--dtype", "fp32", "--weights",
                                       way.split(",")[0]],
                       {"GQA_EXPORT_TRACE_CACHE": str(scratch / "traces") if way == HIT else "off"},
                       source=ROOT / "gqa_export")

    ways = {way: ours(way) for way in (COPY, LINK, HIT)}
    ways[GENAI] = Program(lambda number: [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i",
                                          str(checkpoint), "-o", folder(GENAI, number), "-p", "fp32", "-e", "cpu", "-c",
                                          str(scratch / "genai-cache")], {})
    if mobius:
        ways[MOBIUS] = Program(lambda number: [mobius, "-m", "mobius", "build", "--model", str(checkpoint), "--dtype",
                                               "f32", "--ep", "cpu", folder(MOBIUS, number)], {}, mobius)
    return ways


def output(folder: Path, peer: bool) -> dict[str, float]:
    """What an export left: nodes of the graph, megabytes written, megabytes used where they are."""
    (model,) = folder.rglob("model.onnx")
    nodes = len(onnx.load(model, load_external_data=False).graph.node)
    if peer:
        written = sum(path.stat().st_size for path in folder.rglob("model.onnx*"))
        return {"nodes": nodes, "written_mb": written / 1e6, "linked_mb": 0.0}
    manifest = read_manifest(model.parent)
    return {"nodes": nodes, "written_mb": manifest.bytes_copied / 1e6, "linked_mb": manifest.bytes_linked / 1e6}


def markdown(result: dict[str, Any]) -> str:
    """The figures as a page."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = ["# The cost of an export", "",
             f"{result['date']}, {result['machine']}, {result['cores']} cores, Python {result['python']}; {versions}. "
             f"{result['checkpoint']}, target ort, fp32, no validation; {result['runs']} runs in turn after a warm-up, "
             "medians (least to most). Bytecode of every environment compiled; no run imports a module from source. "
             "Made by `scripts/benchmark_export.py`.", "",
             "| export | wall s | CPU s | peak memory MB | written MB | used where they are MB | nodes |",
             "|---|---|---|---|---|---|---|"]
    for way, rows in result["costs"].items():
        left = result["outputs"][way]
        lines.append(f"| {way} | " + " | ".join(median(rows, figure) for figure in FIGURES)
                     + f" | {left['written_mb']:.1f} | {left['linked_mb']:.1f} | {left['nodes']} |")
    lines += ["", "As a multiple of the best peer of this run, each figure by itself:", "",
              "| export | wall | CPU | peak memory |", "|---|---|---|---|"]
    lines += [f"| {way} | " + " | ".join(f"{row[figure]:.2f}" for figure in FIGURES) + " |"
              for way, row in result["ratios"].items()]
    if "phases" in result:
        lines += ["", "## Where the time goes", "",
                  "CPU time of exports with weights copied, medians of as many runs of their own.", "",
                  *table(result["phases"])]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--checkpoint", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--runs", default=5, type=click.IntRange(1), show_default=True)
@click.option("--mobius", default="", help="Python of an environment with mobius-onnx.")
def main(checkpoint: Path, out: Path, runs: int, mobius: str) -> None:
    """Measure and write the result."""
    with tempfile.TemporaryDirectory(dir=checkpoint.resolve().parent) as scratch:
        ways = programs(checkpoint, Path(scratch), mobius)
        peers = [way for way in ways if way in (GENAI, MOBIUS)]
        result = compare(ways, runs, peers=peers, packages=VERSIONS, tell=click.echo)
        result["outputs"] = {way: output(Path(scratch) / way, way in peers) for way in ways}
        result["phases"] = phases(checkpoint, Path(scratch), runs)
    result["checkpoint"] = checkpoint.name
    out.mkdir(parents=True, exist_ok=True)
    (out / "export.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "export.md").write_text(markdown(result), encoding="utf-8")
    click.echo(markdown(result))


if __name__ == "__main__":
    main()
