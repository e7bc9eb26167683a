"""How long `gqa-export validate` takes on a real model at each level, and what memory: the whole process, cold.

    python scripts/benchmark_validate.py --checkpoint HF_FOLDER --out docs/benchmarks

Exports the `ort` target in fp32 first. Writes validate.json and validate.md.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

VERSIONS = ("torch", "transformers", "onnxruntime", "polygraphy")
LIMITS = {"quick": 60, "full": 600}
"""seconds that a level may take on SmolLM2-135M and two cores"""


def run(*words: str) -> tuple[float, float]:
    """Run gqa-export; its wall seconds and its peak resident megabytes. It must pass."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "gqa_export", *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"gqa-export {words[0]} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - began, used.ru_maxrss / 1e3


def measured(checkpoint: Path) -> list[dict[str, Any]]:
    """One row per level."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        bundle, verdict = f"{place}/bundle", Path(place) / "verdict.json"
        run("onnx", str(checkpoint), "-o", bundle, "--dtype", "fp32", "--no-validate")
        for level in LIMITS:
            wall, peak = run("validate", bundle, "--against", str(checkpoint), "--level", level, "--json", str(verdict))
            said = json.loads(verdict.read_text())
            cases = said["cases"]
            rows.append({"level": level, "wall_s": wall, "peak_mb": peak, "limit_s": LIMITS[level],
                         "cases": len(cases), "steps": max(case["steps"] for case in cases), "passed": said["passed"],
                         "slowest": sorted(((case["seconds"], case["name"]) for case in cases), reverse=True)[:3]})
            click.echo(str(rows[-1]))
    return rows


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# What validation costs", "",
             f"{report['date']}, {report['machine']}; " + ", ".join(f"{n} {v}" for n, v in report["versions"].items())
             + f". Made by `scripts/benchmark_validate.py`: {report['model']}, `ort`, fp32, whole processes.", "",
             "| level | wall | limit | peak memory | cases | longest decode | slowest cases | passed |",
             "|---|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        slowest = ", ".join(f"{name} {seconds:.0f} s" for seconds, name in row["slowest"])
        lines.append(f"| {row['level']} | {row['wall_s']:.0f} s | {row['limit_s']} s | {row['peak_mb'] / 1e3:.1f} GB | "
                     f"{row['cases']} | {row['steps']} steps | {slowest} | {'yes' if row['passed'] else 'NO'} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="docs/benchmarks", show_default=True)
def main(checkpoint: Path, out: Path) -> None:
    """Measure and write."""
    report = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} CPU threads",
              "model": checkpoint.name, "versions": {name: version(name) for name in VERSIONS},
              "rows": measured(checkpoint)}
    (out / "validate.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "validate.md").write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
