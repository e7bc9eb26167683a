"""Speculation by prompt lookup: what followed the last tokens earlier in the text is guessed to follow again.

The guess is fed together with the last token; the model's own choice at each place decides, so that the tokens are
those of decoding one by one (in another batch shape: equal but for rounding). A wrong guess costs one step's width.
Source: Saxena, 2023, "Prompt Lookup Decoding"; Leviathan et al., 2023 (arXiv:2211.17192) for the checking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import GqaExportError
from .session import Session

LONGEST_MATCH = 3


@dataclass(frozen=True)
class Draft:
    """Guesses next tokens. guess: (tokens so far, most) -> the guess. width: tokens that one step may check, the last
    known one included: `verify_width` of the manifest."""

    guess: Callable[[Sequence[int], int], list[int]]
    width: int

    def check(self, session: Session, sequences: int) -> None:
        """Refuse what cannot be checked.

        Raises:
            GqaExportError: the bundle answers with the last logits only, keeps states, or there are several sequences.
        """
        manifest = getattr(session, "manifest", None)
        for refused, words, fix in (
                (self.width < 2, "the bundle answers with the logits of the last token only, and a guess needs those "
                 "of every token", "export it with --logits all"),
                (manifest is not None and manifest.spec.states, "the model keeps states of fixed size, which cannot go "
                 "back over a wrong guess", "leave out --speculate"),
                (sequences > 1, f"one sequence is guessed at a time, and there are {sequences}",
                 "give one prompt")):
            if refused:
                raise GqaExportError(words, "--speculate", fix, code="E-OPTION-SPECULATE")

    def tokens(self, history: Sequence[int], room: int) -> list[int]:
        """A guess of at most `room` tokens; empty where there is none."""
        most = min(self.width - 1, room)
        return self.guess(history, most)[:most] if most > 0 else []


def ngram(history: Sequence[int], most: int) -> list[int]:
    """What followed the latest earlier occurrence of the last tokens, three of them or else two or one."""
    for size in range(min(LONGEST_MATCH, len(history) - 1), 0, -1):
        end = list(history[-size:])
        for start in range(len(history) - size - 1, -1, -1):
            if list(history[start: start + size]) == end:
                return list(history[start + size: start + size + most])
    return []


def draft_room(held: int, capacity: int, switch: int, wanted: int) -> int:
    """Tokens that may be guessed: the step must fit the cache, not cross longrope's switch, and give no more tokens
    than are wanted."""
    limit = switch if held < switch else capacity
    return min(limit - held - 1, wanted - 1)


KINDS = {"ngram": ngram}
