"""What is run: prompts, lengths and steps, chosen so that a wrong mask, window, rotation or length shows.

Every case is a sequence of feeds. Random prompts are seeded and hold no special tokens. Prompts are fed in one
piece unless their logits would not fit in LOGIT_ELEMENTS; then in pieces (batch 1 only).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import GqaExportError
from ..spec import ModelSpec

LOGIT_ELEMENTS = 1 << 24
"""elements of one step's logits: 128 MiB in fp64"""
REACH = 2048
"""longest prompt made only to pass a rotary scaling's original length; windows are always passed if they fit"""
RAGGED_REACH = 1024
"""longest row of the ragged case: three rows are run one by one through PyTorch, twice"""
STATE_PROMPT = 73
"""prompt of a model that keeps states: past the chunk of 64 tokens in which transformers computes linear attention"""
COMPUTED, ATTENDED = 24, 2048
"""tokens whose products take as long as reading the weights once; tokens of past whose attention takes as long as the
products of one: of a small model, on two cores"""
GARBAGE = (1.0e4, -1.0e4)
"""content of the cache's tail in the case `garbage_tail`: far outside any real key, and still finite in fp16"""


@dataclass(frozen=True)
class Case:
    """prompts: one id array per row. counts: new tokens per row [B] for each step after the prompt. free: each side
    feeds its own best token. garbage: what fills the cache beyond the lengths, in turn (none: left as it is). single:
    the bundle takes the prompt one token at a time, PyTorch a piece at once. capacity: of every side's cache, 0 is the
    bundle's own. perplexity: measured over the prompt. whole_row_mask: the bundle's masks have all ones of a row first.
    entry: its line in the suite."""

    name: str
    purpose: str
    prompts: tuple[np.ndarray, ...]
    counts: tuple[tuple[int, ...], ...]
    chunk: int
    free: bool = False
    garbage: tuple[float, ...] = ()
    single: bool = False
    capacity: int = 0
    perplexity: bool = False
    whole_row_mask: bool = False
    entry: str = ""

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.prompts)

    @property
    def feeds(self) -> int:
        """Number of steps in all, prompt included."""
        return -(-max(len(prompt) for prompt in self.prompts) // self.chunk) + len(self.counts)

    @property
    def costs(self) -> tuple[float, ...]:
        """What each feed costs beside a step of one row and one token: what is left of a run is told by it."""
        held, costs = [0] * self.batch, []
        for piece in (*self._pieces(), *self.counts):
            costs.append(sum(_cost(count, before, self.single) for count, before in zip(piece, held) if count))
            held = [before + count for count, before in zip(piece, held)]
        return tuple(costs)

    def _pieces(self) -> list[tuple[int, ...]]:
        """Tokens of each row in each piece of the prompt."""
        lengths = [len(prompt) for prompt in self.prompts]
        return [tuple(min(max(length - start, 0), self.chunk) for length in lengths)
                for start in range(0, max(lengths), self.chunk)]


def _cost(tokens: int, before: int, single: bool) -> float:
    """Reading all weights once, and for each token its products and its attention; fed one by one, the weights are
    read for each of them."""
    return 1 + tokens / COMPUTED * (1 + (before + tokens / 2) / ATTENDED) + (tokens / 2 if single else 0)


@dataclass(frozen=True)
class Plan:
    """The cases, and in words what they could not reach."""

    cases: tuple[Case, ...]
    notes: tuple[str, ...]


def plan_cases(spec: ModelSpec, capacity: int, *, steps: int = 32, original_positions: int = 0,
               special: Iterable[int] = (), text_ids: np.ndarray | None = None, nan_tail_safe: bool = False,
               seed: int = 20, windows: Iterable[int] = ()) -> Plan:
    """Choose the first cases for a decoder.

    Args:
        spec: the decoder. capacity: of the bundle's cache, in tokens. steps: decode steps of each case.
        original_positions: what a scaled rotary was trained for; 0: not scaled.
        special: ids that random prompts avoid.
        text_ids: a sample of text; None: the bundle has no tokenizer.
        nan_tail_safe: whether the cache beyond the lengths may be NaN.
        seed: of the random prompts.
        windows: beside the edges of the spec's layers, which may have lost one.

    Raises:
        GqaExportError: the capacity is too small to hold a prompt and a step.
    """
    if capacity < 8:
        raise GqaExportError(f"a comparison needs a cache of at least 8 tokens, this one holds {capacity}", "capacity",
                             "export with a larger --capacity", code="E-VALIDATE-CAPACITY")
    notes: list[str] = []
    if steps > capacity // 2:
        notes.append(f"{capacity // 2} decode steps instead of {steps}: the cache holds {capacity} tokens")
        steps = capacity // 2
    ids = TokenIds(spec.vocabulary, special, seed)
    room = capacity - steps
    chunk = max(16, min(4096, LOGIT_ELEMENTS // max(spec.vocabulary, 1)))
    reach = sorted({edge for edge in (*windows, *(edge for layer in spec.layers for edge in layer.edges))
                    if 0 < edge < capacity})

    cases = [
        _teacher_forced(ids, room, steps, chunk, reach, original_positions, notes,
                        STATE_PROMPT if spec.states else 48),
        _free_running(ids, room, steps, chunk, reach, text_ids),
        _ragged(ids, room, steps, chunk, reach, notes),
        _garbage_tail(ids, capacity, chunk, (*GARBAGE, float("nan")) if nan_tail_safe else GARBAGE),
    ]
    return Plan(tuple(cases), tuple(notes))


def _teacher_forced(ids: TokenIds, room: int, steps: int, chunk: int, windows: list[int], original: int,
                    notes: list[str], least: int) -> Case:
    length = max([least, *(window + 9 for window in windows)])
    if original and original + 9 <= min(room, REACH):
        length = max(length, original + 9)
    elif original and original + 9 <= room:
        notes.append(f"no prompt passes the rotary scaling's original {original} positions (limit {REACH})")
    length = min(length, room)
    purpose = f"batch 1, {length} tokens" + (f", past the window of {windows[-1]}" if windows else "")
    return Case("teacher_forced", purpose + ", then PyTorch's greedy tokens", (ids(length),), ((1,),) * steps, chunk)


def _free_running(ids: TokenIds, room: int, steps: int, chunk: int, windows: list[int],
                  text_ids: np.ndarray | None) -> Case:
    # the decode steps walk across the smallest window: W - 1, W, W + 1 visible tokens
    length = max(4, windows[0] - steps // 2) if windows else 24
    length = min(length, room, chunk)
    text = text_ids is not None and len(text_ids) >= 4 and not windows
    prompt = text_ids[:room] if text and text_ids is not None else ids(length)
    purpose = f"batch 1, {'text, ' if text else ''}{len(prompt)} tokens, each side feeds its own best token"
    return Case("free_running", purpose, (prompt,), ((1,),) * steps, chunk, free=True)


def _ragged(ids: TokenIds, room: int, steps: int, chunk: int, windows: list[int], notes: list[str]) -> Case:
    longest = max(windows[0] + 6, 14) if windows else 41
    limit = min(RAGGED_REACH, chunk, room - 4)
    if longest > limit:
        if windows and limit < room - 4:
            notes.append(f"ragged rows stop at {limit} tokens, short of the window of {windows[0]}; the case "
                         "teacher_forced passes it")
        longest = max(2, limit)
    prompts = (ids(longest), ids(1), ids(max(2, longest // 3)))
    # two steps are uneven: rows that bring several tokens at once, and a row that brings none
    uneven = {steps // 4: (1, 3, 2), steps // 2: (1, 1, 0)}
    counts = tuple(uneven.get(step, (1, 1, 1)) if steps >= 8 else (1, 1, 1) for step in range(steps))
    return Case("ragged", f"batch 3, right-padded rows of {', '.join(str(len(p)) for p in prompts)} tokens, each "
                "compared with itself alone", prompts, counts, max(chunk, longest))


def _garbage_tail(ids: TokenIds, capacity: int, chunk: int, garbage: tuple[float, ...]) -> Case:
    longest = min(capacity - 4, 11)
    prompts = (ids(longest), ids(max(1, longest // 4)))
    values = ", ".join(map(str, garbage))
    return Case("garbage_tail", f"batch 2, the cache beyond each row's length filled with {values}", prompts,
                ((1, 1),) * 4, max(chunk, longest), garbage=garbage)


class TokenIds:
    """Seeded random token ids without the special ones."""

    def __init__(self, vocabulary: int, special: Iterable[int], seed: int) -> None:
        banned = {token for token in special if 0 <= token < vocabulary}
        allowed = np.setdiff1d(np.arange(vocabulary), np.array(sorted(banned), dtype=np.int64))
        self.allowed = allowed if len(allowed) else np.arange(vocabulary)
        self.random = np.random.default_rng(seed)

    def __call__(self, count: int) -> np.ndarray:
        """int64 [count]."""
        return self.random.choice(self.allowed, size=count).astype(np.int64)
