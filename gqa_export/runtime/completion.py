"""A prompt, continued by a session: text or token ids in, the new tokens and their text out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import GqaExportError
from .generate import STOPPED, GenerationResult, generate
from .sampling import Hook, Sampling, TokenLogprob
from .stop_strings import StopStrings

if TYPE_CHECKING:
    import numpy as np

    from .guidance import Guide
    from .session import Session
    from .speculation import Draft
    from .text import BundleText


STOP, COMPLETE = "stop string", "grammar complete"


@dataclass(frozen=True)
class Completion:
    """What one prompt was continued with.

    Attributes:
        text: the new tokens as text, special tokens left out; None where the bundle has no tokenizer.
        prompt_tokens: ids of the prompt, as they were fed.
        tokens: ids of the new tokens, the end token included.
        finish: why it stopped: "end token", "token limit", "cache full", "stop string" or "grammar complete".
        prefill_s: seconds until the first new token was known. decode_s: seconds for the others.
        decode_steps: calls of the graph after the prompt.
        drafted, accepted: tokens that speculation guessed, and those of them that were right.
        logprobs: of each new token, where they were wanted.
    """

    text: str | None
    prompt_tokens: list[int]
    tokens: list[int]
    finish: str
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_steps: int
    drafted: int = 0
    accepted: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        left_out = {"decode_steps", *(() if self.drafted else ("drafted", "accepted")),
                    *(() if self.logprobs else ("logprobs",))}
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def prompt_ids(prompt: str | None, token_ids: list[int] | None, chat: bool, system: str | None,
               text: BundleText | None, template: str | None = None,
               template_args: Mapping[str, Any] | None = None) -> list[int]:
    """The prompt's token ids. GqaExportError unless exactly one of prompt and token_ids is usable. template,
    template_args: see `BundleText.render_chat`."""
    if (prompt is None) == (token_ids is None):
        raise GqaExportError("expected either a prompt or token ids, got "
                             + ("neither" if prompt is None else "both"), "--prompt, --token-ids",
                             'for example --prompt "The sea is"', code="E-OPTION-PROMPT")
    if (token_ids is not None and chat) or (system is not None and not chat):
        raise GqaExportError("--system belongs to --chat, and --chat to --prompt", "--chat, --system",
                             "give --chat and --prompt together", code="E-OPTION-CHAT")
    if not chat and (template is not None or template_args):
        raise GqaExportError("--chat-template and --template-args belong to --chat", "--chat-template, --template-args",
                             "give --chat and --prompt too", code="E-OPTION-CHAT")
    for words, option in ((prompt, "--prompt"), (system, "--system")):
        if words is not None and not _is_unicode(words):
            raise GqaExportError("the text is not valid Unicode: it holds half of a surrogate pair, or bytes that are "
                                 "not UTF-8", f"{option} {words[:80]!a}", "give text in UTF-8",
                                 code="E-OPTION-UNICODE")
    if token_ids is not None:
        if beyond := [number for number in token_ids if not 0 <= number < 1 << 31]:
            raise GqaExportError(f"a token id is not in any vocabulary: {str(beyond[0])[:40]}", "--token-ids",
                                 "give ids from 0 up to the size of the model's vocabulary",
                                 code="E-OPTION-TOKEN-IDS")
        return list(token_ids)
    assert prompt is not None
    assert text is not None, "a caller with a prompt opens the tokenizer"
    if not chat:
        return text.encode(prompt)
    opening = [{"role": "system", "content": system}] if system is not None else []
    return text.encode_chat([*opening, {"role": "user", "content": prompt}], template, template_args)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Extras:
    """What a completion may have beside its sampling.

    Attributes:
        stop: texts that end it; they are not part of the answer.
        hook: see `generate`.
        logprobs: see `generate`.
        guide: a grammar: it is the hook, and is told of each token.
        draft: see `generate`.
        cached: see `generate`.
    """

    stop: Sequence[str] = ()
    hook: Hook | None = None
    logprobs: int | None = None
    guide: Guide | None = None
    draft: Draft | None = None
    cached: int = 0


def complete(session: Session, ids: list[int], text: BundleText | None, *, max_new_tokens: int,
             end_tokens: Collection[int] = (), sampling: Sampling | None = None,
             on_text: Callable[[str], None] | None = None, extras: Extras | None = None) -> Completion:
    """Continue one prompt.

    Args:
        session: reset first.
        ids: the prompt's token ids.
        text: the bundle's tokenizer; None: `on_text` gets the numbers of the tokens.
        max_new_tokens: stop after so many.
        end_tokens: stop after one of these.
        sampling: how a token is chosen; None is greedy.
        on_text: called with each piece of text as soon as it is certain.
        extras: None: none of them.

    Raises:
        GqaExportError: before anything is run, for a prompt that does not fit, and for stop strings without a
            tokenizer; and for logits that are not numbers.
    """
    extras = extras or Extras()
    if extras.stop and text is None:
        raise GqaExportError("stop strings need the bundle's tokenizer, and it has none", "--stop",
                             "leave them out, or export a checkpoint with a tokenizer", code="E-OPTION-STOP")
    stream = text.stream() if text is not None else None
    stops = StopStrings(extras.stop)
    complete_grammar = False

    def show(piece: str) -> None:
        if piece and on_text is not None:
            on_text(piece)

    def on_token(row: int, token: int) -> bool:
        nonlocal complete_grammar
        show(stops.push(stream.push(token) if stream is not None else f"{token} "))
        if extras.guide is not None:
            complete_grammar = extras.guide.accept(token)
        return not stops.found and not complete_grammar

    def hook(row: int, logits: np.ndarray) -> None:
        if extras.hook is not None:
            extras.hook(row, logits)
        if extras.guide is not None:
            extras.guide.mask(logits)

    result: GenerationResult = generate(
        session, [ids], max_new_tokens, end_tokens, on_token, sampling=sampling, logprobs=extras.logprobs,
        hook=hook if extras.hook or extras.guide else None, draft=extras.draft, cached=extras.cached)
    show(stops.push(stream.flush() if stream is not None else ""))
    show(stops.flush())
    finish = result.finish[0]
    if finish == STOPPED:
        finish = STOP if stops.found else COMPLETE
    answer = text.decode(result.tokens[0]) if text is not None else None
    return Completion(
        stops.cut(answer) if answer is not None else None, ids, result.tokens[0], finish,
        result.prefill_s, result.decode_s, result.prefill_tokens_per_s, result.tokens_per_s, result.decode_steps,
        result.drafted, result.accepted, tuple(result.logprobs[0]) if result.logprobs else ())
