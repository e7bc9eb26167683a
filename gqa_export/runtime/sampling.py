"""How the next token is chosen from its logits: greedy or drawn, with what a user's own function changed before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import GqaExportError

Hook = Callable[[int, np.ndarray], None]
"""(sequence, logits [vocabulary]), changed in place before a token is chosen"""
MOST_LOGPROBS = 100


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep every token; min_p keeps
    those with at least this share of the best one's probability. repetition_penalty divides the positive and multiplies
    the negative logits of tokens that were there; 1 is none (Keskar et al., 2019, arXiv:1909.05858)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, good, fix in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p <= 1, "0 (all) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "more than 0; 1 is none"),
        ):
            if not good:
                raise GqaExportError(f"{name} is out of range: {getattr(self, name)}",
                                     "--" + name.replace("_", "-"), f"use {fix}", code="E-OPTION-SAMPLING")


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was chosen. logprob: natural logarithm of the probability that the model itself gave it, before
    hook, penalty and temperature. top: the best tokens with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Logits of a row to its token. logprobs: how many of the best tokens to record beside the chosen one."""

    def __init__(self, sampling: Sampling, hook: Hook | None = None, logprobs: int | None = None) -> None:
        if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
            raise GqaExportError(f"expected log-probabilities of 0 to {MOST_LOGPROBS} tokens, got {logprobs}",
                                 "--logprobs", "0 records those of the chosen tokens alone",
                                 code="E-OPTION-LOGPROBS")
        self._sampling, self._hook, self._wanted = sampling, hook, logprobs
        self._random = np.random.default_rng(sampling.seed)
        self._found: dict[int, list[TokenLogprob]] = {}

    def __call__(self, row: int, logits: np.ndarray, history: tuple[Sequence[int], ...]) -> int:
        """The next token of a row, whose tokens so far are those of `history`."""
        values = logits
        if self._hook is not None:
            values = logits.copy()
            self._hook(row, values)
            if np.isnan(values).any() or not np.isfinite(values.max()):
                raise GqaExportError("the hook left no token to choose, or NaN", f"row {row}",
                                     "leave at least one finite logit", code="E-RUN-HOOK")
        if self._sampling.repetition_penalty != 1:
            values = penalized(values, history, self._sampling.repetition_penalty)
        token = pick(values, self._sampling, self._random.random() if self._sampling.temperature else 0.0)
        if self._wanted is not None:
            self._found.setdefault(row, []).append(_logprob(logits, token, self._wanted))
        return token

    def logprobs(self, rows: int) -> list[list[TokenLogprob]]:
        """Of every row; none if they were not wanted."""
        return [] if self._wanted is None else [self._found.get(row, []) for row in range(rows)]


def penalized(logits: np.ndarray, history: tuple[Sequence[int], ...], penalty: float) -> np.ndarray:
    """Logits with those of tokens that were there made less likely; a copy."""
    values = logits.copy()
    seen = np.unique(np.concatenate([np.asarray(part, np.int64) for part in history]))
    there = values[seen]
    values[seen] = np.where(there > 0, there / penalty, there * penalty)
    return values


def pick(logits: np.ndarray, sampling: Sampling, uniform: float) -> int:
    """The token that a number from [0, 1) picks.

    Temperature, then the top_k most probable, then the smallest set whose probability reaches top_p, then those with
    min_p of the best one's probability. The first of equal logits counts as the larger. `gqa::choose` in C++ does the
    same.

    Args:
        logits: [vocabulary].
        sampling: temperature 0 is greedy, whatever the number.
        uniform: where in the distribution, tokens in order of their probability.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    order: Any = np.argsort(-logits, kind="stable")
    order = order[: sampling.top_k] if sampling.top_k else order
    apart = logits[order].astype(np.float64) - float(logits[order[0]])
    with np.errstate(over="ignore"):  # a tiny temperature is greedy
        p = np.exp(apart / sampling.temperature)
    p /= p.sum()
    keep = np.cumsum(p) - p < sampling.top_p
    keep &= p >= sampling.min_p * p[0]
    p, order = p[keep] / p[keep].sum(), order[keep]
    total = np.cumsum(p)
    return int(order[np.searchsorted(total / total[-1], uniform, side="right")])


def _logprob(logits: np.ndarray, token: int, best: int) -> TokenLogprob:
    wide = logits.astype(np.float64)
    scale = wide.max() + np.log(np.exp(wide - wide.max()).sum())
    order = np.argsort(-wide, kind="stable")[:best]
    return TokenLogprob(token, float(wide[token] - scale), tuple((int(t), float(wide[t] - scale)) for t in order))
