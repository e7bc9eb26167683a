"""`gqa-export validate`: compare a bundle with PyTorch, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .report_options import report_options
from .trust_options import trust_options

if TYPE_CHECKING:
    from ..report import Reports


@click.command(short_help="Compare a bundle with PyTorch, step by step.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", required=True, metavar="CHECKPOINT", help="Folder, hub id or GGUF file it was made from.")
@click.option("--as", "as_dtype", type=click.Choice(["fp32"]), help="Check the fp32 twin of a bf16 or fp16 bundle.")
@click.option("--provider", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="Where ONNX Runtime runs the bundle.")
@click.option("--steps", type=click.IntRange(1), default=32, show_default=True, help="Decode steps of each case.")
@click.option("--hash", "full_hash", is_flag=True, help="Compute the sha256 of every file, however large.")
@report_options
@trust_options
def command(bundle: Path, against: str, as_dtype: str | None, provider: str, steps: int, full_hash: bool,
            reports: Reports) -> None:
    """Compare BUNDLE with the checkpoint it was made from: logits, every new key and value, the whole cache.

    Exit codes: 0 passed, 1 outputs differ (or drifted from the baseline), 2 bad input, 3 could not be checked here.
    """
    from rich.console import Console

    from ..compare.report import print_verdict
    from ..validation import validate
    from .progress import progress

    say_what_was_checked(bundle)
    with progress(f"validating {bundle.name}") as bar:
        verdict = validate(bundle, against, steps=steps, provider=provider, as_dtype=as_dtype, full_hash=full_hash,
                           progress=bar.report)
    print_verdict(verdict, Console())
    outcome = reports.finish([str(bundle)], against, [verdict])
    for line in (*(f"drift: {drift}" for drift in outcome.drifts), *outcome.notes):
        click.echo(line)
    raise SystemExit(outcome.exit_code)


def say_what_was_checked(bundle: Path) -> None:
    """Of an engine bundle: what can be told without running it. Raises GqaExportError."""
    from ..bundle import read_manifest

    if read_manifest(bundle).engine is None:
        return
    from ..run.trt_check import check_bundle

    for line in check_bundle(bundle).lines:
        click.echo(f"checked: {line}")
