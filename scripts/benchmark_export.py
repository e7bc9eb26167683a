"""What a cold `gqa-export onnx` costs: wall time and peak memory of the whole process, and bytes written.

    python scripts/benchmark_export.py --checkpoint HF_FOLDER --out docs/benchmarks [--runs 3]

One process per run, no validation, no trace cache, weights copied and linked in turn. Writes export.json and
export.md.
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

from gqa_export.bundle import read_manifest


def export_once(checkpoint: Path, folder: Path, weights: str) -> dict[str, float]:
    """Export in a new process; seconds, peak resident megabytes, megabytes written and used where they are."""
    command = [sys.executable, "-m", "gqa_export", "onnx", str(checkpoint), "-o", str(folder), "--no-validate",
               "--weights", weights, "--dtype", "fp32"]
    environment = {name: value for name, value in os.environ.items() if name != "GQA_EXPORT_TRACE_CACHE"}
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if status:
        raise SystemExit(f"the export failed with status {status}")
    manifest = read_manifest(folder)
    return {"wall_s": wall, "cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1e3,
            "written_mb": manifest.bytes_copied / 1e6, "linked_mb": manifest.bytes_linked / 1e6}


def markdown(result: dict) -> str:
    """The figures as a page."""
    lines = ["# The cost of a cold export", "",
             f"{result['date']}, {result['machine']}; {result['checkpoint']}, target ort, fp32, no validation; "
             f"{result['runs']} runs each, medians (least to most). Made by `scripts/benchmark_export.py`.", "",
             "| weights | wall s | CPU s | peak memory MB | written MB | used where they are MB |",
             "|---|---|---|---|---|---|"]
    for weights, rows in result["weights"].items():
        cells = []
        for name in ("wall_s", "cpu_s", "peak_mb"):
            values = sorted(row[name] for row in rows)
            cells.append(f"{statistics.median(values):.1f} ({values[0]:.1f} - {values[-1]:.1f})")
        cells += [f"{rows[0]['written_mb']:.1f}", f"{rows[0]['linked_mb']:.1f}"]
        lines.append(f"| {weights} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--checkpoint", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--runs", default=3, type=click.IntRange(1), show_default=True)
def main(checkpoint: Path, out: Path, runs: int) -> None:
    """Measure and write the result."""
    measured: dict[str, list[dict[str, float]]] = {"copy": [], "link": []}
    with tempfile.TemporaryDirectory(dir=checkpoint.resolve().parent) as scratch:
        for number in range(runs):
            for weights, rows in measured.items():
                rows.append(export_once(checkpoint, Path(scratch) / f"{weights}{number}", weights))
                click.echo(f"{weights}: {json.dumps(rows[-1])}")
    result = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
              "checkpoint": checkpoint.name, "runs": runs, "weights": measured,
              "versions": {name: version(name) for name in ("torch", "transformers", "onnxscript")}}
    out.mkdir(parents=True, exist_ok=True)
    (out / "export.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "export.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
