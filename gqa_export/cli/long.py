"""`gqa-export long`: what approximate attention costs a checkpoint on a text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..errors import EXIT_DIFFERENT
from .long_options import METHOD, how_options, long_options, parsed_lengths
from .trust_options import revision_option, trust_options

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Measure what approximate attention costs on long prompts.")
@click.argument("checkpoint")
@click.option("--text", type=FILE, required=True, help="Text to measure on, in UTF-8.")
@click.option("--lengths", default="4096", show_default=True, metavar="4096,8192", help="Tokens of the prompts.")
@click.option("--long-attention", type=METHOD, default="tiles", show_default=True, help="Method.")
@how_options
@click.option("--json", "json_file", type=FILE, help="Write the report as JSON.")
@click.option("--html", "html_file", type=FILE, help="Write the report as one HTML page without scripts.")
@click.option("--junit", "junit_file", type=FILE, help="Write the report as JUnit XML.")
@revision_option
@trust_options
def command(checkpoint: str, text: Path, lengths: str, long_attention: str, json_file: Path | None,
            html_file: Path | None, junit_file: Path | None, allow_pickle: bool, revision: str | None,
            **options: Any) -> None:
    """Measure CHECKPOINT (a folder, a hub id or a .gguf file) with approximate attention against itself, in PyTorch.

    Nothing is exported. The loss alone would not tell what is lost: the copy score tells how much is left of what the
    model gains on a passage that it has seen before.

    Exit codes: 0 every bound is kept, 1 --max-loss or --min-copy is broken, 2 bad input.
    """
    from rich.console import Console

    from .. import api
    from ..compare.plain import plain
    from ..files.write_text import write_text
    from ..report import long_report
    from ..report.reports import Reports
    from .progress import progress, tell

    Reports(json_file, junit_file, html_file).check()
    source = click.get_current_context().get_parameter_source("min_copy")
    how = long_options(long_attention, options, text)
    assert how is not None
    with progress(f"measuring {checkpoint}") as bar:
        quality = api.measure_long(checkpoint, text=text, lengths=parsed_lengths(lengths), long_attention=how,
                                   allow_pickle=allow_pickle, revision=revision, progress=bar.report)
    if getattr(source, "name", "") == "COMMANDLINE":  # a bound that was asked for is not kept by what has no meaning
        quality = replace(quality, judge_copy=True)
    long_report.show(quality, Console())
    for note in quality.notes:
        click.echo(f"note: {note}")
    for path, content in ((json_file, json.dumps(plain(quality.to_dict()), indent=1, allow_nan=False) + "\n"),
                          (html_file, long_report.html(quality)), (junit_file, long_report.junit(quality))):
        if path is not None:
            write_text(path, content)
    for failure in quality.failures:
        tell(f"error: {failure}\n")
    raise SystemExit(0 if quality.passed else EXIT_DIFFERENT)

