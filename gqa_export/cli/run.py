"""`gqa-export run`: generate text from a prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..objects.bundle import Bundle
    from ..runtime.completion import Completion
    from .progress import Bar


@click.command(short_help="Generate text from a prompt.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="The text to continue, or with --chat the question.")
@click.option("--token-ids", metavar="1,2,3", help="The prompt as token ids, for a bundle without a tokenizer.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template; without a prompt, a chat of "
              "several turns, a line of standard input each.")
@click.option("--system", help="The system message of --chat.")
@click.option("--chat-template", metavar="NAME", help="Template of --chat, for a model that has several by name.")
@click.option("--template-args", metavar="JSON",
              help='Variables for the template: \'{"enable_thinking": false}\', \'{"tools": [...]}\'.')
@click.option("--max-new-tokens", type=int, default=128, show_default=True, help="Stop after this many tokens.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="Sampling temperature; 0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Sample among this many best tokens; 0 is all.")
@click.option("--top-p", type=float, default=1.0, show_default=True,
              help="Sample among the most probable tokens with this total probability.")
@click.option("--min-p", type=float, default=0.0, show_default=True,
              help="Sample among tokens with this share of the best one's probability.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True,
              help="Make tokens that were there less likely; 1 is none.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Text that ends the answer; may be repeated.")
@click.option("--json-schema", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="JSON schema that the answer shall fit (needs the extra `guidance`).")
@click.option("--speculate", type=click.Choice(["ngram"]),
              help="Guess tokens from the text so far and check them in one step; the answer stays the same.")
@click.option("--logprobs", type=int, metavar="N",
              help="With --json: the log-probability of each new token, and of the N best.")
@click.option("--seed", type=int, help="Seed of the sampling, to repeat it.")
@click.option("--adapter", metavar="NAME", help="LoRA adapter of the bundle to use.  [default: none, the base model]")
@click.option("--provider", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="Where the bundle runs; auto is CUDA if it is available.")
@click.option("--low-memory", is_flag=True, help="Leave the weights in their files; about a tenth slower.")
@click.option("--threads", type=int, default=0, show_default=True, help="Threads of ONNX Runtime; 0 lets it choose.")
@click.option("--exact", is_flag=True, help="Leave the graph for long prompts aside, where the bundle has one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of streaming.")
def command(bundle: Path, prompt: str | None, token_ids: str | None, template_args: str | None, as_json: bool,
            **options: Any) -> None:
    """Continue a prompt with BUNDLE. The text is written to standard output as it is generated, the speed to standard
    error.

    Decoding stops at any of the model's end tokens, at --max-new-tokens, or when the cache is full.
    """
    from .. import api
    from .progress import progress, tell

    if options["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs belongs to --json.")
    opened, others = api.open_bundle(bundle), int(os.environ.get("RANK", "0")) > 0  # of torchrun, rank 0 prints
    ids = parse_ids(token_ids) if token_ids is not None else None
    args = parse_args(template_args) if template_args is not None else None
    if options["chat"] and prompt is None and ids is None:
        if as_json or any(options[name] for name in ("json_schema", "speculate")):
            raise click.UsageError("--json, --json-schema and --speculate need a --prompt.")
        converse(opened, args, options)
        return
    with progress(f"loading {bundle.name}") as bar:
        done = opened.complete(prompt, token_ids=ids, template_args=args,
                               on_text=None if as_json or others else shown_after(bar), **options)
    if others:
        return
    if as_json:
        click.echo(json.dumps(done.to_dict(), indent=1))
        return
    click.echo()
    tell(statistics(done, opened.manifest.capacity) + "\n")


def converse(bundle: Bundle, template_args: dict[str, Any] | None, options: dict[str, Any]) -> None:
    """A chat of several turns: each line of standard input is a message, the end of the input ends it."""
    import sys

    from ..runtime.completion import Extras
    from ..runtime.sampling import Sampling
    from .progress import progress

    names = ("system", "chat_template", "adapter", "provider", "low_memory", "threads", "exact")
    own = {name: options[name] for name in names}
    sampling = Sampling(*(options[name] for name in ("temperature", "top_k", "top_p", "seed", "min_p",
                                                     "repetition_penalty")))
    with progress(f"loading {bundle.folder.name}"):
        chat = bundle.conversation(template_args=template_args, **own)
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            click.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line:
            break
        if line.strip():
            done = chat.say(line.rstrip("\r\n"), max_new_tokens=options["max_new_tokens"], sampling=sampling,
                            on_text=lambda piece: click.echo(piece, nl=False), extras=Extras(options["stop"]))
            click.echo()
            click.echo(f"fed {chat.fed} of {len(done.prompt_tokens)} tokens; "
                       f"{statistics(done, bundle.manifest.capacity)}", err=True)


def shown_after(bar: Bar) -> Callable[[str], None]:
    """Print each piece of text; the first one ends the progress line."""

    def show(piece: str) -> None:
        bar.close()
        click.echo(piece, nl=False)

    return show


def parse_ids(text: str) -> list[int]:
    """Token ids written as 1,2,3."""
    from ..errors import GqaExportError

    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise GqaExportError(f"expected whole numbers, got {text!r}", "--token-ids", "write them like 1,2,3",
                             code="E-OPTION-TOKEN-IDS") from error


def parse_args(text: str) -> dict[str, Any]:
    """Variables for a chat template, written as a JSON object."""
    from ..errors import GqaExportError

    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise GqaExportError(f"the variables of the template are not a JSON object: {error}", "--template-args",
                             'write them like \'{"enable_thinking": false}\'', code="E-OPTION-TEMPLATE-ARGS") from error
    return found


def statistics(done: Completion, capacity: int) -> str:
    """One line on the speed, and one on a cache that ran full."""
    from ..runtime.generate import FULL

    count = len(done.tokens)
    speed = f", decode {done.decode_tokens_per_s:.1f} tokens/s" if done.decode_steps else ""
    line = (f"prompt {len(done.prompt_tokens)} tokens, {done.prefill_tokens_per_s:.1f} tokens/s; "
            f"{count} new token{'s' if count != 1 else ''}{speed}; stopped: {done.finish}")
    if done.drafted:
        line += f"\n{done.accepted} of {done.drafted} guessed tokens were right ({done.accepted / done.drafted:.0%})"
    if done.finish == FULL:
        line += f"\nthe cache of {capacity} tokens is full: export with a larger --capacity for a longer answer"
    return line
