"""The options of approximate attention for long prompts, for `gqa-export onnx` and `gqa-export long`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ..exporting.long_plan import LongOptions

Command = TypeVar("Command", bound=Callable[..., Any])
METHOD = click.Choice(["tiles", "hyper"])
_HOW = (
    click.option("--long-layers", default="all", show_default=True, metavar="all|last:N|0-9,20-29|auto",
                 help="Layers to approximate; auto takes as many as --max-loss and --min-copy allow on --text."),
    click.option("--long-leaf", type=click.IntRange(1), default=None,
                 help="Tokens within which attention stays exact.  [default: 1024]"),
    click.option("--long-heavy", type=click.IntRange(1), default=None,
                 help="Keys that are chosen for a row.  [default: tiles 384, hyper 256]"),
    click.option("--long-samples", type=click.IntRange(1), default=None,
                 help="Keys that are drawn for a row.  [default: tiles 128, hyper 256]"),
    click.option("--long-anchors", type=click.IntRange(0), default=None,
                 help="First keys that are always read; 0 with hyper is HyperAttention as published.  [default: 4]"),
    click.option("--seed", type=click.IntRange(0, 1 << 31), default=0, show_default=True,
                 help="Seed of the tables that samples are drawn by."),
    click.option("--max-loss", type=click.FloatRange(0), default=0.05, show_default=True,
                 help="Nats per token that approximating may cost on the text."),
    click.option("--min-copy", type=click.FloatRange(max=1), default=0.9, show_default=True,
                 help="Share of what the exact model gains on a repeated passage that must be left."),
)


def how_options(command: Command) -> Command:
    """Add the options that say how and where attention is approximated."""
    for option in reversed(_HOW):
        command = option(command)
    return command


def long_options(method: str | None, options: dict[str, Any], text: Path | None,
                 from_tokens: int | None = None) -> LongOptions | None:
    """What the options say, which are taken out of `options`; None without a method.

    Raises:
        UsageError: an option is given, and --long-attention is not.
    """
    from ..exporting.long_plan import LongOptions

    taken = {name: options.pop(name) for name in ("long_layers", "long_leaf", "long_heavy", "long_samples",
                                                  "long_anchors", "seed", "max_loss", "min_copy")}
    if method is None:
        source = click.get_current_context().get_parameter_source
        given = [name for name in (*taken, "text", "long_from")
                 if getattr(source(name), "name", "DEFAULT") == "COMMANDLINE"]
        if given:
            raise click.UsageError(f"--{given[0].replace('_', '-')} belongs to --long-attention.")
        return None
    return LongOptions(method, taken["long_layers"], taken["long_leaf"], taken["long_heavy"], taken["long_samples"],
                       taken["long_anchors"], taken["seed"], from_tokens, text, taken["max_loss"], taken["min_copy"])


def parsed_lengths(words: str) -> tuple[int, ...]:
    """Lengths written as 4096,8192."""
    from ..errors import GqaExportError

    parts = [part.strip() for part in words.split(",")]
    if any(not part.isdecimal() or len(part) > 9 or int(part) < 1 for part in parts):
        raise GqaExportError(f"expected whole numbers, got {words!r}", "--lengths", "write them like 4096,8192",
                             code="E-OPTION-LENGTHS")
    return tuple(sorted({int(part) for part in parts}))
