"""The decode loop: prompts in, tokens out, over any session. Greedy unless told otherwise.

Dimensions: B sequences, S new tokens, V vocabulary. A prompt is fed in pieces so that the logits of a long one
never exist at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import GqaExportError
from .rows import rope_switch
from .sampling import Chooser, Hook, Sampling, TokenLogprob
from .session import Session
from .speculation import Draft, draft_room

PREFILL_PIECE = 512
"""tokens fed at once: 512 rows of a 150k vocabulary are 0.3 GB of fp32 logits"""

END, LIMIT, FULL, STOPPED = "end token", "token limit", "cache full", "stopped"


@dataclass(frozen=True)
class GenerationResult:
    """tokens: new ones per sequence, end token included. finish: why each stopped (END, LIMIT, FULL or STOPPED).

    prefill_s: until the first token was known; decode_s: the rest. decode_steps: calls of the graph after prefill.
    drafted, accepted: tokens that were guessed, and those of them that the model would have chosen. logprobs: of every
    token, if they were wanted.
    """

    tokens: list[list[int]]
    finish: list[str]
    prompt_tokens: int
    prefill_s: float
    decode_s: float
    decode_steps: int
    drafted: int = 0
    accepted: int = 0
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)

    @property
    def decoded(self) -> int:
        """Tokens that came out of decode steps: all but each sequence's first, which the prefill gave."""
        return sum(max(len(tokens) - 1, 0) for tokens in self.tokens)

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second, all sequences together; 0 if nothing was decoded."""
        return self.decoded / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second, all sequences together."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s > 0 else 0.0


def generate(session: Session, prompts: Sequence[Sequence[int]], max_new_tokens: int,
             eos_token_ids: Collection[int] = (), on_token: Callable[[int, int], bool | None] | None = None, *,
             sampling: Sampling | None = None, prefill_piece: int = PREFILL_PIECE, hook: Hook | None = None,
             logprobs: int | None = None, draft: Draft | None = None, cached: int = 0) -> GenerationResult:
    """Continue each prompt until an end token, the token limit or a full cache.

    A sequence that is done rides along with the others; its cache is of no use after.

    A longrope model rotates a sequence beyond its original length by another table, and keys in the cache stay as they
    were: a prompt beyond it is fed at once, and a sequence that grows beyond it is fed again as a whole, as the
    `generate` of transformers does for these models.

    Args:
        session: reset first, unless `cached`.
        prompts: token ids of each sequence, one or more.
        max_new_tokens: of each sequence.
        eos_token_ids: a sequence ends with one of these.
        on_token: called with (sequence, token) as soon as a token is known, end tokens included; False ends the
            sequence.
        sampling: how a token is chosen; None is greedy.
        prefill_piece: tokens of a prompt that are fed at once.
        hook: called with (sequence, logits [vocabulary]) before each choice; it may change the logits in place.
        logprobs: log-probabilities of each token and of this many best ones; None: none.
        draft: guesses tokens that are then checked in one step (`speculation`); the tokens stay the same.
        cached: tokens at the beginning of the only prompt that the session holds already.

    Raises:
        GqaExportError: before anything is run, for a prompt that is empty or does not fit, and for a draft that this
            session cannot check; and for NaN logits.
    """
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    _check(lengths, session.capacity, max_new_tokens)
    if draft is not None:
        draft.check(session, len(prompts))
    choose = Chooser(sampling or Sampling(), hook, logprobs)
    ends = frozenset(eos_token_ids)
    tokens: list[list[int]] = [[] for _ in prompts]
    finish = [""] * len(prompts)

    def take(logits: np.ndarray, held: np.ndarray) -> None:
        """Choose a token for every sequence that goes on, whose cache holds `held` tokens."""
        active = np.array([not f for f in finish])
        if np.isnan(logits[active]).any():
            raise GqaExportError("the logits are NaN", f"after {len(max(tokens, key=len))} new tokens",
                                 _fix_for_nan(session),
                                 code="E-RUN-NAN")
        for row in np.flatnonzero(active).tolist():
            token = choose(row, logits[row], (prompts[row], tokens[row]))
            tokens[row].append(token)
            go_on = on_token is None or on_token(row, token) is not False
            if token in ends:
                finish[row] = END
            elif not go_on:
                finish[row] = STOPPED
            elif len(tokens[row]) >= max_new_tokens:
                finish[row] = LIMIT
            elif held[row] >= session.capacity:
                finish[row] = FULL

    switch = rope_switch(session)
    leaf = getattr(session, "leaf", 0)
    if leaf:  # pieces that end at leaves are approximated as the whole prompt would be
        prefill_piece = -(-prefill_piece // leaf) * leaf
    started = time.perf_counter()
    take(_prefill(session, prompts, prefill_piece, switch, cached), session.lengths)
    prefilled = time.perf_counter()
    steps = drafted = accepted = 0
    while not all(finish):
        going = np.array([not f for f in finish])
        if switch and (going & (session.lengths == switch)).any():
            take(_prefill(session, _so_far(session, prompts, tokens, going), prefill_piece, switch), session.lengths)
            steps += 1
            continue
        guess: list[int] = []
        if draft is not None:
            room = draft_room(int(session.lengths[0]), session.capacity, switch, max_new_tokens - len(tokens[0]))
            guess = draft.tokens([*prompts[0], *tokens[0]], room)
        if guess:
            right = _checked(session, tokens[0][-1], guess, tokens[0], take, finish)
            drafted, accepted, steps = drafted + len(guess), accepted + right, steps + 1
            continue
        ids = np.array([[row[-1]] for row in tokens], dtype=np.int64)
        # a finished sequence with a full cache can bring nothing more; others ride along: a batch whose rows all
        # bring one token is what every backend does in one call
        new = np.where(~going & (session.lengths >= session.capacity), 0, 1)
        take(session.step(ids, new).logits[:, 0], session.lengths)
        steps += 1
    ended = time.perf_counter()
    return GenerationResult(tokens, finish, int(lengths.sum()) - cached, prefilled - started, ended - prefilled, steps,
                            drafted, accepted, choose.logprobs(len(prompts)))


def _checked(session: Session, last: int, guess: list[int], tokens: list[int],
             take: Callable[[np.ndarray, np.ndarray], None], finish: list[str]) -> int:
    """Feed the last token and a guess of those after it, and take what the model chooses, up to the first token that
    was not guessed. The cache then holds what it would hold without the guess. How many were right."""
    before = int(session.lengths[0])
    logits = session.step(np.array([[last, *guess]], dtype=np.int64)).logits
    right = 0
    for place in range(len(guess) + 1):
        take(logits[:, place], np.array([before + 1 + place]))
        if finish[0] or place == len(guess) or tokens[-1] != guess[place]:
            break
        right += 1
    session.rewind_row(0, before + 1 + right)
    return right


def _fix_for_nan(session: Session) -> str:
    check = "compare the bundle with its checkpoint: gqa-export validate BUNDLE --against ..."
    half = getattr(getattr(session, "manifest", None), "dtype", "") == "float16"
    return f"float16 may have overflowed, export with --dtype bf16 or fp32; or {check}" if half else check


def _check(lengths: np.ndarray, capacity: int, max_new_tokens: int) -> None:
    if len(lengths) == 0 or lengths.min() == 0:
        raise GqaExportError("a prompt is empty", "prompt", "give at least one token", code="E-RUN-PROMPT")
    if max_new_tokens < 1:
        raise GqaExportError(f"max_new_tokens must be at least 1, got {max_new_tokens}", "--max-new-tokens",
                             "generate at least one token", code="E-OPTION-MAX-NEW-TOKENS")
    if lengths.max() > capacity:
        raise GqaExportError(f"the prompt has {int(lengths.max())} tokens, and the cache holds {capacity}", "prompt",
                             f"shorten it, or export with --capacity {int(lengths.max()) + max_new_tokens} or more",
                             code="E-RUN-CAPACITY")


def _so_far(session: Session, prompts: Sequence[Sequence[int]], tokens: list[list[int]],
            going: np.ndarray) -> list[Sequence[int]]:
    """What each sequence consists of, its last token included; of one that is done, what the cache holds."""
    whole = [[*prompt, *new] for prompt, new in zip(prompts, tokens)]
    return [row if more else row[: int(held)] for row, more, held in zip(whole, going, session.lengths)]


def _prefill(session: Session, prompts: Sequence[Sequence[int]], piece: int, switch: int,
             cached: int = 0) -> np.ndarray:
    """Feed all prompts; the logits [B, V] of each one's last token. switch: a prompt of more tokens is fed at once.
    cached: tokens of the only prompt that are there already, fewer than all."""
    if cached:
        session.rewind_row(0, cached)
        prompts = [prompts[0][cached:]]
    else:
        session.reset(len(prompts))
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    if 0 < switch < lengths.max() + cached:
        piece = int(lengths.max())
    last: list[np.ndarray] = [np.empty(0)] * len(prompts)
    for start in range(0, int(lengths.max()), piece):
        new = np.clip(lengths - start, 0, piece)
        ids = np.zeros((len(prompts), int(new.max())), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : new[row]] = prompt[start: start + piece]
        logits = session.step(ids, new).logits
        for row, count in enumerate(new.tolist()):
            if count:
                # a bundle made with --logits last answers with one row only
                last[row] = logits[row, count - 1 if logits.shape[1] > 1 else 0]
    return np.stack(last)
