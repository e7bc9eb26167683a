"""`gqa-export bisect`: the first layer and operator that is out of tolerance, and the known fault that fits."""

from __future__ import annotations

from pathlib import Path

import click

from .trust_options import unused_option


@click.command(short_help="Find the first layer and operator whose output is out of tolerance.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", required=True, metavar="CHECKPOINT",
              help="Checkpoint that it was exported from: folder, hub id or GGUF file.")
@unused_option
def command(bundle: Path, against: str, ignore_unused: bool) -> None:
    """Feed every layer of BUNDLE with PyTorch's own inputs; find the first operator whose output is out of tolerance.

    Exit codes: 0 all outputs are within tolerance, 1 one is not, 2 bad input, 3 could not be checked here.
    """
    from .. import api
    from .progress import progress

    with progress(f"bisecting {bundle.name}") as bar:
        bar.report("feeding every layer from PyTorch", None, None)
        found = api.open_bundle(bundle).bisect(against, ignore_unused=ignore_unused)
    click.echo(f"probes: {', '.join(found.probes)}")
    for note in found.notes:
        click.echo(f"note: {note}")
    if found.finding is None:
        click.echo("every operator of every layer is within tolerance")
    else:
        click.echo(f"first out of tolerance: {found.finding}")
    raise SystemExit(found.exit_code)
