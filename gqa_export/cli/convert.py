"""`gqa-export convert`: a checkpoint with fewer key/value heads, and what that costs each layer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .trust_options import revision_option, trust_options, unused_option

if TYPE_CHECKING:
    from ..conversion.convert import Conversion


@click.command(short_help="Reduce the key/value heads of a checkpoint: MHA to GQA to MQA.")
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Checkpoint folder to write.")
@click.option("--kv-heads", required=True, metavar="K|K,K,...|auto",
              help="Key/value heads: one number, one for each layer, or the fewest within --max-error.")
@click.option("--method", type=click.Choice(["mean", "first", "random", "svd", "calibrated"]), default="mean",
              show_default=True, help="How a group of heads becomes one; calibrated needs --text.")
@click.option("--grouping", type=click.Choice(["contiguous", "similarity"]), default="contiguous", show_default=True,
              help="Which heads are pooled: neighbours, or those most alike (queries are reordered with them).")
@click.option("--max-error", type=click.FloatRange(0, min_open=True), default=None,
              help="Largest relative error of a layer's attention output, for --kv-heads auto.")
@click.option("--text", type=click.Path(path_type=Path), default=None, help="UTF-8 text for --method calibrated.")
@click.option("--tokens", type=click.IntRange(16), default=4096, show_default=True,
              help="Tokens that are used, spread over the text.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of --method random.")
@click.option("--json", "json_file", metavar="FILE|-", help="Write the report as JSON; - is standard output.")
@click.option("--force", is_flag=True, help="Replace an earlier conversion.")
@unused_option
@revision_option
@trust_options
def command(checkpoint: str, output: Path, json_file: str | None, **options: Any) -> None:
    """Reduce the key/value heads of CHECKPOINT (a folder or a hub id) and write an ordinary Hugging Face checkpoint.

    The method is from Ainslie et al., 2023: pool the heads of a group, then train for a small part of the original
    steps with `gqa-export uptrain`. The output folder also holds the report, as gqa_convert.json.
    """
    from .. import api
    from .progress import progress

    with progress(f"converting {checkpoint}") as bar:
        result = api.convert(checkpoint, output, progress=bar.report, **options)
    text = json.dumps(asdict(result), indent=1)
    if json_file == "-":
        click.echo(text)
        return
    describe(result)
    if json_file is not None:
        Path(json_file).write_text(text + "\n", encoding="utf-8")


def describe(result: Conversion) -> None:
    """Print what was written and the errors of each layer."""
    from .tables import aligned, readable_bytes

    before, after = readable_bytes(result.cache_bytes_before), readable_bytes(result.cache_bytes)
    click.echo(f"{result.folder}: key/value heads {_numbers(result.kv_heads_before)} -> {_numbers(result.kv_heads)}, "
               f"cache per token {before} -> {after}")
    rows = [(str(row.layer), str(row.kv_heads), f"{row.key:.3f}", f"{row.value:.3f}",
             "" if row.output is None else f"{row.output:.3f}") for row in result.layers]
    header = ("layer", "kv heads", "key error", "value error", "output error")
    for line in aligned(header, rows, left=0):
        click.echo(line)
    curve = ", ".join(f"{count}: {error:.3f}" for count, error in sorted(result.errors_by_kv_heads.items()))
    if curve:
        click.echo(f"  largest output error of a layer by key/value heads: {curve}")
    if result.suggested_kv_heads is not None:
        click.echo(f"  the error rises steeply below {result.suggested_kv_heads} key/value heads")
    for note in result.notes:
        click.echo(f"  note: {note}")


def _numbers(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else ",".join(map(str, values))
