"""Decode speed as a user gets it: our session on our bundle against onnxruntime-genai's own loop on its own bundle.

    python scripts/benchmark_decode.py --checkpoint HF_FOLDER --out docs/benchmarks

Both are made of the same checkpoint with their defaults, in fp32, and decode greedily, batch 1, one thread each.
`evidence.decode_in_turn` says what makes the comparison fair. Bytecode is compiled first, and no variable limits
threads. Writes decode.json and decode.md; takes some four minutes.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from evidence.decode_in_turn import PEER, STEPS, WARM, for_one_thread, rounds, speeds
from evidence.whole_process import AGAINST_BYTECODE, compile_bytecode, unbelievable_rows

import gqa_export as gqa
from gqa_export.bundle.manifest import read_manifest
from gqa_export.environment.machine import cores, processor

OURS = "gqa-export"
LENGTHS = (128, 1024)
ROUNDS = 4
ROOM = 2048
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GQA_EXPORT_HUGE_PAGES", "GLIBC_TUNABLES")
VERSIONS = ("torch", "transformers", "onnxruntime", "onnxruntime-genai")
REQUIRED = ("date", "machine", "cores", "load_before", "python", "versions", "model", "bytecode", "rounds", "threads",
            "rows")
FIGURES = ("past", OURS, PEER, "speed", "speed_clock", "speed_rounds", "same_tokens")
ROOT = Path(__file__).parent.parent


def make_theirs(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as the peer's builder exports it."""
    subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(folder),
                    "-p", "fp32", "-e", "cpu", "-c", str(folder.parent / "cache")], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return for_one_thread(folder)


def row(length: int, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One length, of all rounds."""
    steps = [one["steps"][str(length)] for one in found]
    made: dict[str, Any] = {"past": length}
    for name in (OURS, PEER):
        clock, core = zip(*(pair for one in steps for pair in one[name]))
        quarter = statistics.quantiles(clock, n=4)
        made[name] = {"median_ms": round(statistics.median(clock), 2),
                      "quartiles_ms": [round(quarter[0], 2), round(quarter[2], 2)],
                      "core_ms": round(statistics.median(core), 2)}
    each = speeds(steps, OURS, PEER)
    made["speed"] = round(statistics.geometric_mean(each), 3)
    made["speed_clock"] = round(statistics.geometric_mean(speeds(steps, OURS, PEER, 0)), 3)
    return made | {"speed_rounds": each, "same_tokens": sum(one["same"] for one in found)}


def unbelievable(report: dict[str, Any]) -> list[str]:
    """What a result lacks to be believed; empty if nothing."""
    return unbelievable_rows(report, REQUIRED, FIGURES, "past", LENGTHS)


def page(report: dict[str, Any]) -> str:
    """The figures as a page."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [f"# Decode speed: {report['model']}", "",
             f"{report['date']}, {report['machine']}, {report['cores']} cores, Python {report['python']}; {versions}. "
             f"fp32, batch 1, greedy, {report['threads']} thread each; {report['rounds']} rounds in processes of their "
             f"own, {STEPS} steps of each decoder in turn at every length. Both bundles as they are exported by "
             "default, ours in our session, the peer's in its own loop. Milliseconds on the clock (quartiles), and of "
             "it on a core. Speeds are compared by the latter: the median over pairs of steps of a round, and the "
             "geometric mean of the rounds. Bytecode compiled. Made by `scripts/benchmark_decode.py`.", "",
             f"| past | {OURS}, ms | on a core | {PEER}, ms | on a core | our speed / theirs | on the clock | of each "
             "round | rounds with the same tokens |", "|---" * 9 + "|"]
    for line in report["rows"]:
        cells = [f"{line[name]['median_ms']} ({line[name]['quartiles_ms'][0]} - {line[name]['quartiles_ms'][1]}) | "
                 f"{line[name]['core_ms']}" for name in (OURS, PEER)]
        lines.append(f"| {line['past']} | {' | '.join(cells)} | **{line['speed']}** | {line['speed_clock']} | "
                     f"{', '.join(map(str, line['speed_rounds']))} | {line['same_tokens']} of {report['rounds']} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="docs/benchmarks", show_default=True)
def main(checkpoint: Path, out: Path) -> None:
    """Measure, print and write the comparison."""
    for name in (*THREADS, *AGAINST_BYTECODE):
        os.environ.pop(name, None)
    load = os.getloadavg()[0]
    compile_bytecode(sys.executable, ROOT / "gqa_export")
    with tempfile.TemporaryDirectory() as place:
        ours, theirs = Path(place) / "ours", Path(place) / "theirs"
        gqa.export(checkpoint, ours, dtype="fp32", provider="cpu")
        vocabulary = read_manifest(ours).spec.vocabulary
        found = rounds({OURS: ours, PEER: make_theirs(checkpoint, theirs)}, vocabulary, [LENGTHS] * ROUNDS, ROOM,
                       click.echo)
    report = {"date": date.today().isoformat(), "machine": f"{processor()} ({platform.machine()})", "cores": cores(),
              "load_before": load, "python": platform.python_version(), "bytecode": "compiled",
              "model": checkpoint.name, "versions": {name: version(name) for name in VERSIONS}, "rounds": ROUNDS,
              "threads": 1, "steps": STEPS, "warm": WARM, "rows": [row(length, found) for length in LENGTHS]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "decode.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "decode.md").write_text(page(report), encoding="utf-8")
    click.echo(page(report))


if __name__ == "__main__":
    main()
