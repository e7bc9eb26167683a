"""`gqa-export bisect`: the first layer and op of a bundle that is wrong, and what the error looks like."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Name the first layer and op that differ from PyTorch.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", required=True, metavar="CHECKPOINT", help="Folder, hub id or GGUF file it was made from.")
def command(bundle: Path, against: str) -> None:
    """Feed every layer of BUNDLE with PyTorch's own inputs and name the first op whose output is off.

    Exit codes: 0 nothing found, 1 something is wrong, 2 bad input, 3 could not be checked here.
    """
    from .. import api
    from .progress import progress

    with progress(f"bisecting {bundle.name}") as bar:
        bar.report("feeding every layer from PyTorch", None, None)
        found = api.open_bundle(bundle).bisect(against)
    click.echo(f"probes: {', '.join(found.probes)}")
    if found.finding is None:
        click.echo("every op of every layer is within rounding of PyTorch")
    else:
        click.echo(f"first wrong: {found.finding}")
    raise SystemExit(found.exit_code)
