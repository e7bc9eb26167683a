"""`gqa-export uptrain`: continued pre-training of a converted checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .trust_options import trust_options, unused_option


@click.command(short_help="Continue pre-training after a conversion.")
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Checkpoint folder to write.")
@click.option("--text", required=True, metavar="FILE|hub:NAME[:CONFIG[:SPLIT]]",
              help="UTF-8 text, or a data set of the hub with a column text.")
@click.option("--eval-text", default="", metavar="FILE|hub:...",
              help="Text for evaluation.  [default: the end of --text]")
@click.option("--held-out", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.1, show_default=True,
              help="Part of --text, at its end, that is used for evaluation only.")
@click.option("--steps", type=click.IntRange(1), default=None,
              help="Optimizer steps.  [default: once through the text]")
@click.option("--fraction", type=click.FloatRange(0, min_open=True), default=None,
              help="Steps as a part of --pretraining-steps (alpha; the paper uses 0.05).")
@click.option("--pretraining-steps", type=click.IntRange(1), default=None,
              help="Steps of the original pre-training, for --fraction.")
@click.option("--length", type=click.IntRange(2), default=512, show_default=True, help="Tokens of a packed row.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Rows of a batch, per device.")
@click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True,
              help="Batches per optimizer step.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=2e-4, show_default=True,
              help="Peak learning rate of the cosine schedule.")
@click.option("--warmup", type=click.FloatRange(0, 1), default=0.05, show_default=True,
              help="Part of the steps in which the learning rate rises.")
@click.option("--weight-decay", type=click.FloatRange(0), default=0.1, show_default=True, help="Weight decay of AdamW.")
@click.option("--teacher", default="", metavar="CHECKPOINT",
              help="Also learn from this model's distribution: the original model.")
@click.option("--distill-weight", type=click.FloatRange(0, 1), default=0.5, show_default=True,
              help="Weight of the teacher in the loss.")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
              help="Temperature of both distributions.")
@click.option("--bf16", is_flag=True, help="Mixed precision; weights and optimizer stay fp32.")
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, about a third more time.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order of the rows.")
@click.option("--eval-steps", type=click.IntRange(1), default=None,
              help="Steps between evaluations.  [default: ten evaluations in all]")
@click.option("--eval-rows", type=click.IntRange(1), default=64, show_default=True,
              help="Most rows of an evaluation, spread over the held-out text.")
@click.option("--log-steps", type=click.IntRange(1), default=1, show_default=True,
              help="Steps averaged in each point of the training curve.")
@click.option("--save-steps", type=click.IntRange(1), default=None,
              help="Steps between the checkpoints that a run resumes from.  [default: as --eval-steps]")
@click.option("--restart", is_flag=True, help="Discard an unfinished run instead of resuming it.")
@click.option("--json", "json_file", metavar="FILE|-", help="Write the curve as JSON; - is standard output.")
@click.option("--force", is_flag=True, help="Replace an earlier result.")
@unused_option
@trust_options
def command(checkpoint: str, output: Path, restart: bool, json_file: str | None, **options: Any) -> None:
    """Train CHECKPOINT, a folder that `gqa-export convert` wrote, on a text. After a kill, run it again: it resumes.

    Several GPUs or machines: `accelerate launch -m gqa_export uptrain ...`.
    """
    from .. import api
    from .progress import progress

    with progress(f"uptraining {checkpoint}") as bar:
        result = api.uptrain(checkpoint, output, restart=restart, progress=bar.report, **options)
    text = json.dumps(asdict(result), indent=1)
    if json_file == "-":
        click.echo(text)
        return
    click.echo(f"{result.folder}: {result.steps} steps, {result.tokens:,} tokens; held-out perplexity "
               f"{result.perplexity_before:.2f} -> {result.perplexity_after:.2f}")
    click.echo(f"  the curve: {result.folder}/gqa_uptrain.json and gqa_uptrain.svg")
    for note in result.notes:
        click.echo(f"  note: {note}")
    if result.resumed_at is not None:
        click.echo(f"  resumed at step {result.resumed_at}")
    if json_file is not None:
        Path(json_file).write_text(text + "\n", encoding="utf-8")
