"""How far apart two sets of logits are as predictions: relative error, KL divergence, best tokens, perplexity.

Not what decides (that is the bound on every element, `compare.tolerance`), but what a reader knows how to weigh.
Dimensions: T tokens, V vocabulary. Everything in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .shares import in_shares

MOST_TOKENS = 32
"""tokens of one step that are looked at, evenly spaced, the last one included: a log-softmax over a large vocabulary
costs more than running a small model"""


@dataclass(frozen=True)
class LogitMetrics:
    """Over the tokens looked at. max_rel: |got - expected| by the largest |expected| of that token's logits. kl in
    nats, of the bundle's prediction from PyTorch's. top1, top5: share of tokens with the same best token, and mean
    overlap of the best five. greedy_prefix: tokens of a free run that were the same before the first that
    differed (no tie), -1 where each side was fed the same. perplexity: PyTorch's and the bundle's on the
    case's text."""

    tokens: int
    max_rel: float
    mean_kl: float
    max_kl: float
    top1: float
    top5: float
    greedy_prefix: int = -1
    perplexity: tuple[float, float] | None = None


class LogitTally:
    """Adds up what `LogitMetrics` holds, step by step; keeps one row of logits per side at most."""

    def __init__(self) -> None:
        self.tokens, self.max_rel, self.kl, self.max_kl, self.top1, self.top5 = 0, 0.0, 0.0, 0.0, 0.0, 0.0
        self._loss, self._predicted = np.zeros(2), 0
        self._last: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, expected_TV: np.ndarray, got_TV: np.ndarray) -> None:
        """Valid tokens of one row of one step."""
        count = len(expected_TV)
        if not count:
            return
        pick = np.unique(np.linspace(0, count - 1, min(count, MOST_TOKENS)).astype(int))
        shares = in_shares(lambda rows: _weigh(expected_TV[pick[rows]], got_TV[pick[rows]]), len(pick),
                           expected_TV.shape[1])
        rel, kl, top1, top5 = (np.concatenate(each) for each in zip(*shares))
        self.max_rel, self.max_kl = max(self.max_rel, _worst(rel)), max(self.max_kl, _worst(kl))
        self.tokens += len(pick)
        self.kl += float(kl.sum())
        self.top1 += float(top1.sum())
        self.top5 += float(top5.sum() / min(5, expected_TV.shape[1]))

    def read(self, ids_T: np.ndarray, expected_TV: np.ndarray, got_TV: np.ndarray) -> None:
        """A piece of one text, in order: what each token was predicted with by the logits before it."""
        for side, logits in enumerate((expected_TV, got_TV)):
            before = logits[:-1] if self._last is None else np.concatenate([self._last[side][None], logits[:-1]])
            wanted = ids_T[1:] if self._last is None else ids_T
            for start in range(0, len(wanted), MOST_TOKENS):
                rows = slice(start, start + MOST_TOKENS)
                predicted = log_softmax(before[rows].astype(np.float64))
                self._loss[side] -= predicted[np.arange(len(predicted)), wanted[rows]].sum()
        self._predicted += len(ids_T) - (self._last is None)
        self._last = (np.array(expected_TV[-1]), np.array(got_TV[-1]))

    def metrics(self, greedy_prefix: int = -1) -> LogitMetrics | None:
        """The sums as means; None if nothing was added."""
        if not self.tokens:
            return None
        n = self.tokens
        perplexity = tuple(float(np.exp(loss / self._predicted)) for loss in self._loss) if self._predicted else None
        return LogitMetrics(n, self.max_rel, self.kl / n, self.max_kl, self.top1 / n, self.top5 / n, greedy_prefix,
                            perplexity)  # type: ignore[arg-type]


def _weigh(expected_TV: np.ndarray, got_TV: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of every token [T]: relative error, KL divergence, whether the best token is the same, and how many of the best
    five are."""
    expected, got = expected_TV.astype(np.float64), got_TV.astype(np.float64)
    with np.errstate(all="ignore"):
        scale = np.maximum(np.abs(expected).max(1), np.finfo(np.float64).tiny)
        rel = np.abs(got - expected).max(1) / scale
        a, b = log_softmax(expected), log_softmax(got)
        kl = np.maximum((np.exp(a) * (a - b)).sum(1), 0.0)
    width = min(5, expected.shape[1])
    best = [np.argpartition(-side, width - 1, axis=1)[:, :width] for side in (expected, got)]
    same = np.array([len(np.intersect1d(x, y)) for x, y in zip(*best)])
    return rel, kl, expected.argmax(1) == got.argmax(1), same


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax along the last axis, fp64 [T, V]."""
    shifted = logits_TV - logits_TV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _worst(values: np.ndarray) -> float:
    return float("inf") if np.isnan(values).any() else float(values.max(initial=0.0))
