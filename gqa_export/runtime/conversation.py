"""Several turns with one model: each feeds what the cache does not hold yet, and goes back where the texts part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .completion import Completion, Extras, complete
from .sampling import Sampling
from .session import Session
from .text import BundleText


class Conversation:
    """A chat with a bundle. Belongs to one thread at a time, and has the session for itself.

    Attributes:
        messages: all so far, dicts of role and content.
        fed: tokens of the last turn that were not in the cache before.
    """

    def __init__(self, session: Session, text: BundleText, end_tokens: Collection[int], system: str | None = None,
                 template: str | None = None, template_args: Mapping[str, Any] | None = None) -> None:
        text.chat_template(template, template_args or {})  # refused before anything is said
        self._session, self._text, self._ends = session, text, end_tokens
        self._template, self._args = template, template_args
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self._held: list[int] = []
        self.fed = 0

    def say(self, message: str, *, max_new_tokens: int = 128, sampling: Sampling | None = None,
            on_text: Callable[[str], None] | None = None, extras: Extras | None = None) -> Completion:
        """Say something and get the answer. Arguments as of `complete`; an error leaves the conversation as it was.

        Raises:
            GqaExportError: the conversation does not fit the cache any more.
        """
        turn = [*self.messages, {"role": "user", "content": message}]
        ids = self._text.encode_chat(turn, self._template, self._args)
        cached = self._kept(ids)
        held, self._held = self._held, []  # if it fails below, the cache is unknown
        if cached == len(held):
            self._session.mark_row(0)
        done = complete(self._session, ids, self._text, max_new_tokens=max_new_tokens, end_tokens=self._ends,
                        sampling=sampling, on_text=on_text, extras=replace(extras or Extras(), cached=cached))
        self.fed = len(ids) - cached
        self._held = [*ids, *done.tokens[:-1]]
        self.messages = [*turn, {"role": "assistant", "content": done.text or ""}]
        return done

    def _kept(self, ids: Sequence[int]) -> int:
        """Tokens of a prompt, all but its last at most, that the cache holds and may keep."""
        if not self._held:
            return 0
        same = next((place for place, (one, other) in enumerate(zip(ids, self._held)) if one != other),
                    min(len(ids), len(self._held)))
        return self._session.nearest_length(0, min(same, len(ids) - 1))
