"""`gqa-export run`: let a bundle answer a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest
    from ..runtime.generate import GenerationResult
    from ..runtime.text import BundleText


@click.command(short_help="Let a bundle answer a prompt.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="The text to continue, or with --chat the question.")
@click.option("--token-ids", metavar="1,2,3", help="The prompt as token ids; needs no tokenizer.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--system", help="The system message of --chat.")
@click.option("--max-new-tokens", type=int, default=128, show_default=True, help="Stop after so many.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Sample among so many; 0 is all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample among the most probable.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--provider", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="Where it runs; auto is CUDA if it is there.")
@click.option("--low-memory", is_flag=True, help="Leave the weights in their files: slower by about a tenth.")
@click.option("--threads", type=int, default=0, show_default=True, help="0 lets ONNX Runtime choose.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of streaming.")
def command(bundle: Path, prompt: str | None, token_ids: str | None, chat: bool, system: str | None,
            max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int | None, provider: str,
            low_memory: bool, threads: int, as_json: bool) -> None:
    """Continue a prompt with BUNDLE: the text goes to standard output as it comes, the speed to standard error.

    Stops at any of the model's end tokens, at --max-new-tokens, or when the cache is full.
    """
    from ..bundle.manifest import read_manifest
    from ..runtime.generate import Sampling, generate
    from ..runtime.open_session import open_bundle
    from ..runtime.text import BundleText, has_tokenizer
    from .progress import progress

    manifest = read_manifest(bundle)
    sampling = Sampling(temperature, top_k, top_p, seed)
    text = BundleText(bundle) if prompt is not None or has_tokenizer(bundle) else None
    ids = prompt_ids(prompt, token_ids, chat, system, text)
    with progress(f"loading {bundle.name}"):
        session = open_bundle(bundle, provider, low_memory=low_memory, threads=threads)
    stream = text.stream() if text is not None else None
    show = (lambda piece: None) if as_json else (lambda piece: click.echo(piece, nl=False))
    result = generate(session, [ids], max_new_tokens, manifest.tokens.get("eos", ()),
                      token_printer(show, stream.push if stream is not None else None), sampling=sampling)
    if as_json:
        click.echo(json.dumps(summary(result, ids, text), indent=1))
        return
    click.echo(stream.flush() if stream is not None else "")
    click.echo(statistics(result, manifest), err=True)


def prompt_ids(prompt: str | None, token_ids: str | None, chat: bool, system: str | None,
               text: BundleText | None) -> list[int]:
    """The prompt's token ids. Raises GqaExportError unless exactly one of prompt and token_ids is usable."""
    from ..errors import GqaExportError

    if (prompt is None) == (token_ids is None):
        raise GqaExportError("give either --prompt or --token-ids", "gqa-export run",
                             'for example --prompt "The sea is"')
    if (token_ids is not None and chat) or (system is not None and not chat):
        raise GqaExportError("--system belongs to --chat, and --chat to --prompt", "gqa-export run",
                             "give --chat and --prompt together")
    if token_ids is not None:
        try:
            return [int(part) for part in token_ids.replace(",", " ").split()]
        except ValueError as error:
            raise GqaExportError(f"not a list of whole numbers: {token_ids!r}", "--token-ids",
                                 "write it like 1,2,3") from error
    assert text is not None
    assert prompt is not None
    if not chat:
        return text.encode(prompt)
    opening = [{"role": "system", "content": system}] if system is not None else []
    return text.encode_chat([*opening, {"role": "user", "content": prompt}])


def token_printer(show: Callable[[str], None], push: Callable[[int], str] | None) -> Callable[[int, int], None]:
    """What to do with each new token: print the text it completes, or its number where there is no tokenizer."""

    def on_token(_row: int, token: int) -> None:
        piece = push(token) if push is not None else f"{token} "
        if piece:
            show(piece)

    return on_token


def summary(result: GenerationResult, prompt: list[int], text: BundleText | None) -> dict[str, object]:
    """The whole run as plain data."""
    return {
        "text": text.decode(result.tokens[0]) if text is not None else None,
        "prompt_tokens": prompt,
        "tokens": result.tokens[0],
        "finish": result.finish[0],
        "prefill_s": result.prefill_s,
        "decode_s": result.decode_s,
        "prefill_tokens_per_s": result.prefill_tokens_per_s,
        "decode_tokens_per_s": result.tokens_per_s,
    }


def statistics(result: GenerationResult, manifest: Manifest) -> str:
    """One line on the speed, and one on a cache that ran full."""
    from ..runtime.generate import FULL

    count = len(result.tokens[0])
    speed = f", decode {result.tokens_per_s:.1f} tokens/s" if result.decode_steps else ""
    line = (f"prompt {result.prompt_tokens} tokens, {result.prefill_tokens_per_s:.1f} tokens/s; "
            f"{count} new token{'s' if count != 1 else ''}{speed}; stopped: {result.finish[0]}")
    if result.finish[0] == FULL:
        line += (f"\nthe cache of {manifest.capacity} tokens is full: export with a larger --capacity for a longer "
                 "answer")
    return line
