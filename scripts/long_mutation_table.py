"""The mutation table of approximate attention: graphs for long prompts broken on purpose, and which case catches each.

    python scripts/long_mutation_table.py       # docs/trust.md and docs/benchmarks/long_mutations.json, two minutes

A tiny Llama is exported once with each method; the damage is done to `prefill.onnx`. The level `quick` has the first
cases of `full`, so one run of `full` tells of both.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import click
from evidence.mutations.of_long import LONG_MUTATIONS, OPTIONS, broken_bundle
from evidence.mutations.table import Row, shares, table

from gqa_export.bundle.manifest import read_manifest
from gqa_export.compare.suite import LEVELS
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.progress import silent
from gqa_export.validation.long_cases import judge_long, long_cases
from gqa_export.validation.reference import Reference, open_reference

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "benchmarks" / "long_mutations.json"
BEGIN, END = "<!-- mutations: made by scripts/long_mutation_table.py -->", "<!-- end of mutations of long prompts -->"


def failed_cases(folder: Path, reference: Reference) -> dict[str, tuple[str, ...]]:
    """By level, the cases that fail."""
    manifest = read_manifest(folder)
    wrong = [case.name for case, _ in judge_long(folder, manifest, "cpu", reference, "float32", "full", silent, 1)
             if not case.passed]
    known = {level: {case.name for case in long_cases(manifest, level)} for level in LEVELS}
    return {level: tuple(name for name in wrong if name in known[level]) for level in LEVELS}


def rows_of(work: Path) -> list[Row]:
    """Every kind of damage to the graph of each method; graphs that are not damaged must pass."""
    from gqa_models import write_tiny

    checkpoint, rows = write_tiny("llama", work / "llama"), []
    for method, options in OPTIONS.items():
        bundle = work / method
        export_onnx(checkpoint, bundle, ExportOptions(target="ort", dtype="fp32", long=options))
        reference = open_reference(checkpoint, read_manifest(bundle), "float32", [])
        if failed_cases(bundle, reference)["full"]:
            raise SystemExit(f"the undamaged bundle of method {method} fails")
        for change in LONG_MUTATIONS:
            broken = broken_bundle(bundle, work / "broken", change)
            rows.append(Row(change.__name__.replace("_", " "), (change.__doc__ or "").split(".")[0],
                            f"llama ort, {method}", failed_cases(broken, reference)))
            shutil.rmtree(broken)
            click.echo(f"{rows[-1].kind}, {method}: {rows[-1].caught}")
    return rows


def text_of(rows: list[Row]) -> str:
    """The rows as they stand in docs/trust.md."""
    caught = "; ".join(f"`{level}` catches {share:.0%}" for level, share in shares(rows).items())
    return f"{len(rows)} graphs for long prompts: {caught}.\n\n{table(rows)}\n"


@click.command()
def main() -> None:
    """Break graphs, run the cases, write the table."""
    with tempfile.TemporaryDirectory(prefix="gqa-long-mutations-") as place:
        rows = rows_of(Path(place))
    OUT.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    page = ROOT / "docs" / "trust.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text_of(rows)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
