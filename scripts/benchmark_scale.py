"""What an export costs as models grow: a 1B model, its conversion under a memory budget, and 2 to 126 layers of 405B.

    python scripts/benchmark_scale.py --scratch FOLDER --out docs/benchmarks

Every export is a process of its own without a trace cache and without validation; wall time and peak memory are the
whole process's. Checkpoints are made by `sparse_checkpoint.py` (the 1B one filled with random values: 2.5 GB of
disk). Writes scale.json, scale.md and scale.svg; takes some minutes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import click
import onnx

sys.path.insert(0, str(Path(__file__).parent))
from sparse_checkpoint import write_sparse

from gqa_export.bundle.manifest import read_manifest

DEPTHS = (2, 8, 32, 64, 126)
SMALL, LARGE = "llama-3.2-1b", "llama-3.1-405b"


def export(checkpoint: Path, folder: Path, *options: str) -> dict[str, float]:
    """Export in a new process; seconds, peak memory in GB, GB written and used where they are."""
    command = [sys.executable, "-m", "gqa_export", "onnx", str(checkpoint), "-o", str(folder), "--no-validate",
               *options]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL,
                               env={**os.environ, "GQA_EXPORT_TRACE_CACHE": "off"})
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if status:
        raise SystemExit(f"the export failed with status {status}: {' '.join(command)}")
    manifest = read_manifest(folder)
    nodes = len(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)
    shutil.rmtree(folder)
    return {"wall_s": round(wall, 2), "cpu_s": round(used.ru_utime + used.ru_stime, 2),
            "peak_gb": round(used.ru_maxrss / 1e6, 3), "written_gb": round(manifest.bytes_copied / 1e9, 6),
            "linked_gb": round(manifest.bytes_linked / 1e9, 3), "nodes": nodes}


def plot(depths: dict[int, dict[str, float]], path: Path) -> None:
    """Time and memory over depth."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, time_axis = pyplot.subplots(figsize=(7, 3.6))
    layers = list(depths)
    time_axis.plot(layers, [depths[n]["wall_s"] for n in layers], "o-", color="tab:blue", label="wall time, s")
    time_axis.set(xlabel="decoder layers", ylabel="seconds", ylim=(0, None),
                  title="Export of a Llama-3.1-405B-shaped model, weights linked")
    memory_axis = time_axis.twinx()
    memory_axis.plot(layers, [depths[n]["peak_gb"] for n in layers], "s--", color="tab:red", label="peak memory, GB")
    memory_axis.set(ylabel="GB", ylim=(0, 2))
    lines = time_axis.get_lines() + memory_axis.get_lines()
    time_axis.legend(lines, [line.get_label() for line in lines], loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def markdown(result: dict) -> str:
    """The figures as a page."""
    head = "| export | layers | wall s | CPU s | peak memory GB | written GB | used where they are GB |"
    lines = ["# What an export costs as models grow", "",
             f"{result['date']}, {result['machine']}. Made by `scripts/benchmark_scale.py`; no validation, no trace "
             "cache, one process per row.", "", head, "|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(f"| {row['what']} | {row['layers']} | {row['wall_s']:.1f} | {row['cpu_s']:.1f} | "
                     f"{row['peak_gb']:.2f} | {row['written_gb']:.3f} | {row['linked_gb']:.1f} |")
    return "\n".join([*lines, "", "![time and memory over depth](scale.svg)"]) + "\n"


@click.command()
@click.option("--scratch", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
def main(scratch: Path, out: Path) -> None:
    """Measure and write the result."""
    rows = []

    def measure(what: str, layers: int, checkpoint: Path, *options: str) -> dict[str, float]:
        figures = export(checkpoint, scratch / "bundle", *options)
        rows.append({"what": what, "layers": layers, **figures})
        click.echo(json.dumps(rows[-1]))
        return figures

    shutil.rmtree(scratch, ignore_errors=True)
    write_sparse(SMALL, scratch / "small", fill=True)
    measure("Llama-3.2-1B-shaped bf16, linked", 16, scratch / "small", "--weights", "link")
    measure("the same, converted to fp16 under --max-ram 1GB", 16, scratch / "small", "--dtype", "fp16",
            "--max-ram", "1GB")
    depths = {}
    for layers in DEPTHS:
        folder = scratch / f"large-{layers}"
        write_sparse(LARGE, folder, layers=layers)
        depths[layers] = measure("Llama-3.1-405B-shaped bf16, linked", layers, folder, "--weights", "link")
    shutil.rmtree(scratch)
    out.mkdir(parents=True, exist_ok=True)
    result = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
              "rows": rows, "versions": {name: version(name) for name in ("torch", "transformers", "onnxscript")}}
    (out / "scale.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "scale.md").write_text(markdown(result))
    plot(depths, out / "scale.svg")


if __name__ == "__main__":
    main()
