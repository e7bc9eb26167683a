"""CPU seconds that each row of the table of stand-ins saves: exports with all rows, and with all but one.

    python scripts/stand_in_seconds.py --checkpoint HF_FOLDER [--runs 3]

A row that saves nothing without another ("with ...") is left out together with that one. Runs go in turn; one process
per run, weights linked, no trace cache, no validation. Prints the medians, for `gqa_export/environment/stand_ins.py`.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import click
from evidence.whole_process import Program, compile_bytecode, run_once

from gqa_export.environment.stand_in_rows import SWITCH
from gqa_export.environment.stand_ins import TABLE

ALL = "all rows"
ROOT = Path(__file__).parent.parent


def left_out(module: str) -> str:
    """The rows without which the time of `module`'s row is measured, as the switch takes them."""
    return ",".join(row.module for row in TABLE if module in (row.module, row.until.removeprefix("with ")))


@click.command()
@click.option("--checkpoint", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--runs", default=3, type=click.IntRange(1), show_default=True)
def main(checkpoint: Path, runs: int) -> None:
    """Measure and print."""
    rows = {ALL: "", **{row.module: left_out(row.module) for row in TABLE if row.seconds}}
    with tempfile.TemporaryDirectory(dir=checkpoint.resolve().parent) as scratch:
        program = Program(lambda number: [sys.executable, "-m", "gqa_export", "onnx", str(checkpoint), "-o",
                                          str(Path(scratch) / str(number)), "--no-validate", "--dtype", "fp32",
                                          "--weights", "link"], {}, source=ROOT / "gqa_export")
        compile_bytecode(program.python, program.source)
        costs: dict[str, list[float]] = {row: [] for row in rows}
        for number in range(-1, runs):
            for row, switch in rows.items():
                cost = run_once(program.command(number), {"GQA_EXPORT_TRACE_CACHE": "off", SWITCH: switch})
                shutil.rmtree(Path(scratch) / str(number))
                if number >= 0:
                    costs[row].append(cost.cpu_s)
    base = statistics.median(costs.pop(ALL))
    click.echo(f"{ALL}: {base:.2f} s")
    for row, values in costs.items():
        click.echo(f"without {row}: {statistics.median(values) - base:+.2f} s")


if __name__ == "__main__":
    main()
