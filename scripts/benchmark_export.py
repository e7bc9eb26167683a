"""What a cold `gqa-export onnx` costs: wall time and peak memory of the whole process, and bytes written.

    python scripts/benchmark_export.py --checkpoint HF_FOLDER --out docs/benchmarks [--runs 3]

One process per run, no validation, in turn: weights copied and weights linked without a trace cache, linked again with
the trace kept (a hit), and two peers on the same checkpoint: the model builder of onnxruntime-genai, and mobius if
`--mobius PYTHON` names the interpreter of an environment that has it. Writes export.json and export.md.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import click
import onnx

from gqa_export.bundle.manifest import read_manifest

PEER = "onnxruntime-genai builder"
VERSIONS = ("torch", "transformers", "onnxscript", "onnxruntime-genai")
HIT, MOBIUS = "link, trace kept", "mobius"
WAYS = ("copy", "link", HIT, PEER)


def export_once(checkpoint: Path, folder: Path, way: str, traces: Path, mobius: str) -> dict[str, float]:
    """Export in a new process; seconds, peak resident megabytes, megabytes written and used where they are."""
    environment = {**os.environ, "GQA_EXPORT_TRACE_CACHE": str(traces) if way == HIT else "off"}
    if way == MOBIUS:
        command = [mobius, "-m", "mobius", "build", "--model", str(checkpoint), "--dtype", "f32", "--ep", "cpu",
                   str(folder)]
    elif way == PEER:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(folder),
                   "-p", "fp32", "-e", "cpu", "-c", str(folder) + ".cache"]
    else:
        command = [sys.executable, "-m", "gqa_export", "onnx", str(checkpoint), "-o", str(folder), "--no-validate",
                   "--weights", way.split(",")[0], "--dtype", "fp32"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if status:
        raise SystemExit(f"the export failed with status {status}: {' '.join(command)}")
    (model,) = folder.rglob("model.onnx")
    nodes = len(onnx.load(model, load_external_data=False).graph.node)
    figures = {"nodes": nodes, "wall_s": wall, "cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1e3}
    if way in (PEER, MOBIUS):
        written = sum(path.stat().st_size for path in folder.rglob("model.onnx*"))
        return {**figures, "written_mb": written / 1e6, "linked_mb": 0.0}
    manifest = read_manifest(folder)
    return {**figures, "written_mb": manifest.bytes_copied / 1e6, "linked_mb": manifest.bytes_linked / 1e6}


def markdown(result: dict) -> str:
    """The figures as a page."""
    lines = ["# The cost of a cold export", "",
             f"{result['date']}, {result['machine']}; {result['checkpoint']}, target ort, fp32, no validation; "
             f"{result['runs']} runs each, medians (least to most). Made by `scripts/benchmark_export.py`.", "",
             "| export | wall s | CPU s | peak memory MB | written MB | used where they are MB | nodes |",
             "|---|---|---|---|---|---|---|"]
    for way, rows in result["ways"].items():
        cells = []
        for name in ("wall_s", "cpu_s", "peak_mb"):
            values = sorted(row[name] for row in rows)
            cells.append(f"{statistics.median(values):.1f} ({values[0]:.1f} - {values[-1]:.1f})")
        cells += [f"{rows[0]['written_mb']:.1f}", f"{rows[0]['linked_mb']:.1f}", f"{rows[0]['nodes']}"]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    walls = {way: statistics.median(row["wall_s"] for row in rows) for way, rows in result["ways"].items()}
    peers = {way: wall for way, wall in walls.items() if way in (PEER, MOBIUS)}
    best = min(peers, key=lambda way: peers[way])
    ratios = [f"{way} {walls[way] / peers[best]:.2f}" for way in ("copy", "link", HIT)]
    lines += ["", f"Wall time as a multiple of {best}'s, the fastest peer of this run: {'; '.join(ratios)}."]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--checkpoint", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--runs", default=3, type=click.IntRange(1), show_default=True)
@click.option("--mobius", default="", help="Python of an environment with mobius-onnx.")
def main(checkpoint: Path, out: Path, runs: int, mobius: str) -> None:
    """Measure and write the result."""
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in (*WAYS, *([MOBIUS] if mobius else []))}
    with tempfile.TemporaryDirectory(dir=checkpoint.resolve().parent) as scratch:
        export_once(checkpoint, Path(scratch) / "first", HIT, Path(scratch) / "traces", mobius)
        for number in range(runs):
            for place, (way, rows) in enumerate(measured.items()):
                rows.append(export_once(checkpoint, Path(scratch) / f"{number}-{place}", way, Path(scratch) / "traces",
                                        mobius))
                click.echo(f"{way}: {json.dumps(rows[-1])}")
    result = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
              "checkpoint": checkpoint.name, "runs": runs, "ways": measured,
              "versions": {name: version(name) for name in VERSIONS}}
    out.mkdir(parents=True, exist_ok=True)
    (out / "export.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "export.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
