"""How long `gqa-export validate` takes on a real model at each level, and what memory: the whole process, cold.

    python scripts/benchmark_validate.py --checkpoint HF_FOLDER --out docs/benchmarks

Exports the `ort` target in fp32 first. Bytecode is compiled first and no variable limits threads, as in a user's shell.
Writes validate.json and validate.md; takes some five minutes on two cores.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from evidence.whole_process import compile_bytecode, run_once, unbelievable_rows

from gqa_export.environment.machine import cores, processor

ROOT = Path(__file__).parent.parent
VERSIONS = ("torch", "transformers", "onnxruntime", "polygraphy")
LIMITS = {"quick": 40, "full": 200}
"""seconds that a level may take on SmolLM2-135M and two cores"""
PEAK_MB = 3500
"""memory that either may take"""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
REQUIRED = ("date", "machine", "cores", "load_before", "python", "versions", "model", "bytecode", "rows")
FIGURES = ("level", "wall_s", "cpu_s", "peak_mb", "limit_s", "limit_mb", "cases", "steps", "passed", "slowest")


def measured(checkpoint: Path) -> list[dict[str, Any]]:
    """One row per level."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        bundle, verdict = f"{place}/bundle", Path(place) / "verdict.json"
        program = [sys.executable, "-m", "gqa_export"]
        run_once([*program, "onnx", str(checkpoint), "-o", bundle, "--dtype", "fp32", "--no-validate"], {})
        for level in LIMITS:
            cost = run_once([*program, "validate", bundle, "--against", str(checkpoint), "--level", level, "--json",
                             str(verdict)], {})
            said = json.loads(verdict.read_text())
            cases = said["cases"]
            rows.append({"level": level, "wall_s": cost.wall_s, "cpu_s": cost.cpu_s, "peak_mb": cost.peak_mb,
                         "limit_s": LIMITS[level], "limit_mb": PEAK_MB, "cases": len(cases),
                         "steps": max(case["steps"] for case in cases), "passed": said["passed"],
                         "slowest": sorted(((case["seconds"], case["name"]) for case in cases), reverse=True)[:3]})
            click.echo(str(rows[-1]))
    return rows


def unbelievable(report: dict[str, Any]) -> list[str]:
    """What a result lacks to be believed; empty if nothing."""
    return unbelievable_rows(report, REQUIRED, FIGURES, "level", LIMITS)


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = ["# What validation costs", "",
             f"{report['date']}, {report['machine']}, {report['cores']} cores, Python {report['python']}; {versions}. "
             f"Made by `scripts/benchmark_validate.py`: {report['model']}, `ort`, fp32, whole processes, bytecode "
             "compiled.", "",
             "| level | wall | limit | CPU | peak memory | limit | cases | longest decode | slowest cases | passed |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        slowest = ", ".join(f"{name} {seconds:.0f} s" for seconds, name in row["slowest"])
        lines.append(f"| {row['level']} | {row['wall_s']:.0f} s | {row['limit_s']} s | {row['cpu_s']:.0f} s | "
                     f"{row['peak_mb'] / 1e3:.1f} GB | {row['limit_mb'] / 1e3:.1f} GB | "
                     f"{row['cases']} | {row['steps']} steps | {slowest} | {'yes' if row['passed'] else 'NO'} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="docs/benchmarks", show_default=True)
def main(checkpoint: Path, out: Path) -> None:
    """Measure and write."""
    for name in THREADS:
        os.environ.pop(name, None)
    load = os.getloadavg()[0]
    compile_bytecode(sys.executable, ROOT / "gqa_export")
    report = {"date": date.today().isoformat(), "machine": f"{processor()} ({platform.machine()})", "cores": cores(),
              "load_before": load, "python": platform.python_version(), "bytecode": "compiled",
              "model": checkpoint.name, "versions": {name: version(name) for name in VERSIONS},
              "rows": measured(checkpoint)}
    (out / "validate.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "validate.md").write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
