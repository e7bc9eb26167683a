"""A prompt, continued by a session: text or token ids in, the new tokens and their text out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import GqaExportError
from .generate import GenerationResult, Sampling, generate

if TYPE_CHECKING:
    from .session import Session
    from .text import BundleText


@dataclass(frozen=True)
class Completion:
    """What one prompt was continued with.

    Attributes:
        text: the new tokens as text, special tokens left out; None where the bundle has no tokenizer.
        prompt_tokens: ids of the prompt, as they were fed.
        tokens: ids of the new tokens, the end token included.
        finish: why it stopped: "end token", "token limit" or "cache full".
        prefill_s: seconds until the first new token was known. decode_s: seconds for the others.
        decode_steps: calls of the graph after the prompt.
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

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "decode_steps"}


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


def complete(session: Session, ids: list[int], text: BundleText | None, *, max_new_tokens: int,
             end_tokens: Collection[int] = (), sampling: Sampling | None = None,
             on_text: Callable[[str], None] | None = None) -> Completion:
    """Continue one prompt.

    Args:
        session: reset first.
        ids: the prompt's token ids.
        text: the bundle's tokenizer; None: `on_text` gets the numbers of the tokens.
        max_new_tokens: stop after so many.
        end_tokens: stop after one of these.
        sampling: how a token is chosen; None is greedy.
        on_text: called with each piece of text as soon as it is certain.

    Raises:
        GqaExportError: before anything is run, for a prompt that does not fit; and for logits that are not numbers.
    """
    stream = text.stream() if text is not None else None

    def on_token(_row: int, token: int) -> None:
        piece = stream.push(token) if stream is not None else f"{token} "
        if piece and on_text is not None:
            on_text(piece)

    result: GenerationResult = generate(session, [ids], max_new_tokens, end_tokens, on_token, sampling=sampling)
    rest = stream.flush() if stream is not None else ""
    if rest and on_text is not None:
        on_text(rest)
    return Completion(
        text.decode(result.tokens[0]) if text is not None else None, ids, result.tokens[0], result.finish[0],
        result.prefill_s, result.decode_s, result.prefill_tokens_per_s, result.tokens_per_s, result.decode_steps)
