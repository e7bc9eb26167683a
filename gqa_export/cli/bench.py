"""`gqa-export bench`: load time, tokens per second and memory of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from ..objects.choices import Provider
    from ..runtime.benchmark import Speed


@click.command(short_help="Measure load time, tokens per second and memory.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Length of the prompt.")
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to decode after it.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences per step.")
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs, for the medians.")
@click.option("--provider", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="Where the bundle runs; auto is CUDA if it is available.")
@click.option("--low-memory", is_flag=True, help="Leave the weights in their files.")
@click.option("--threads", type=int, default=0, show_default=True, help="Threads of ONNX Runtime; 0 lets it choose.")
@click.option("--exact", is_flag=True, help="Leave the graph for long prompts aside, where the bundle has one.")
@click.option("--json", "json_file", metavar="FILE|-", help="Write the figures as JSON; - is standard output.")
def command(bundle: Path, prompt_tokens: int, new_tokens: int, batch: int, repeat: int, provider: Provider,
            low_memory: bool, threads: int, exact: bool, json_file: str | None) -> None:
    """Measure BUNDLE on random prompts. End tokens do not stop the decoding."""
    from rich.console import Console

    from .. import api
    from .progress import progress

    with progress(f"measuring {bundle.name}") as bar:
        speed = api.open_bundle(bundle).benchmark(
            prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, repeat=repeat, provider=provider,
            low_memory=low_memory, threads=threads, exact=exact, progress=bar.report)
    figures = json.dumps(speed.to_dict(), indent=1)
    if json_file == "-":
        click.echo(figures)
        return
    Console().print(table(speed))
    if json_file is not None:
        Path(json_file).write_text(figures + "\n", encoding="utf-8")


def table(speed: Speed) -> Table:
    """The figures, one a row."""
    from rich.table import Table

    shown = Table(title=f"{Path(speed.bundle).name}: {speed.target}, {speed.dtype}, {speed.cache} cache")
    shown.add_column("figure")
    shown.add_column("value", justify="right")
    shown.add_column("how")
    runs = f"median of {len(speed.decode)}"
    shown.add_row("load", f"{speed.load_s:.2f} s", "once")
    shown.add_row("prefill", f"{speed.prefill_tokens_per_s:.1f} tokens/s",
                  f"{runs}, batch {speed.batch}, {speed.prompt_tokens} tokens each")
    shown.add_row("decode", f"{speed.decode_tokens_per_s:.1f} tokens/s",
                  f"{runs}, batch {speed.batch}, {speed.new_tokens} tokens each")
    if speed.weight_bytes_per_token:
        shown.add_row("weights read", f"{speed.weight_bytes_per_token / 1e6:.1f} MB a step",
                      "of the graph; what a decode step cannot do without")
    if speed.cache_bytes_per_step:
        tokens = speed.prompt_tokens + speed.new_tokens - 1
        shown.add_row("cache read", f"{speed.cache_bytes_per_step / 1e6:.3f} MB a step",
                      f"{speed.cache_kind}, at {tokens} tokens of {speed.batch} sequences; a token of one adds "
                      f"{speed.cache_bytes_per_token:,} bytes")
    shown.add_row("decode step", f"{speed.decode_step_ms:.2f} ms", runs)
    for name, size, how in (
        ("anonymous memory", speed.anonymous_mib, "resident after loading, backed by no file"),
        ("peak memory", speed.peak_mib, "most ever resident, mapped weights included"),
    ):
        shown.add_row(name, "unknown here" if size is None else f"{size:.0f} MiB", how)
    return shown
