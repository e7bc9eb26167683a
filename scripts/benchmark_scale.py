"""What an export costs as models grow: a 1B model, its conversion under a memory budget, 2 to 126 layers of 405B, and a
hybrid of linear attention and attention.

    python scripts/benchmark_scale.py --scratch FOLDER --out docs/benchmarks [--only-hybrid]

Every export is a process of its own without a trace cache and without validation; wall time and peak memory are the
whole process's. Checkpoints are made by `sparse_checkpoint.py` (the 1B one filled with random values: 2.5 GB of
disk). Writes scale.json, scale.md and scale.svg; takes some minutes. With `--only-hybrid` the rows of the others stay
as they were committed.
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
HYBRID, HYBRID_DEPTHS = "qwen3-next-48l", (8, 16, 32, 48)
HYBRID_ROW = "Qwen3-Next-shaped bf16, dense, linked"


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
@click.option("--only-hybrid", is_flag=True, help="Measure the hybrid alone, and keep the other committed rows.")
def main(scratch: Path, out: Path, only_hybrid: bool) -> None:
    """Measure and write the result."""
    known = json.loads((out / "scale.json").read_text()) if only_hybrid else {"rows": []}
    rows = [row for row in known["rows"] if row["what"] != HYBRID_ROW]

    def measure(what: str, layers: int, checkpoint: Path, *options: str) -> dict[str, float]:
        figures = export(checkpoint, scratch / "bundle", *options)
        rows.append({"what": what, "layers": layers, **figures})
        click.echo(json.dumps(rows[-1]))
        return figures

    def grown(name: str, what: str, depths: tuple[int, ...]) -> dict[int, dict[str, float]]:
        found = {}
        for layers in depths:
            folder = scratch / f"{name}-{layers}"
            write_sparse(name, folder, layers=layers)
            found[layers] = measure(what, layers, folder, "--weights", "link")
        return found

    shutil.rmtree(scratch, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    if not only_hybrid:
        write_sparse(SMALL, scratch / "small", fill=True)
        measure("Llama-3.2-1B-shaped bf16, linked", 16, scratch / "small", "--weights", "link")
        measure("the same, converted to fp16 under --max-ram 1GB", 16, scratch / "small", "--dtype", "fp16",
                "--max-ram", "1GB")
        plot(grown(LARGE, "Llama-3.1-405B-shaped bf16, linked", DEPTHS), out / "scale.svg")
    grown(HYBRID, HYBRID_ROW, HYBRID_DEPTHS)
    shutil.rmtree(scratch)
    result = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
              "rows": rows, "versions": {name: version(name) for name in ("torch", "transformers", "onnxscript")}}
    (out / "scale.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "scale.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
