"""What approximate attention costs a model on a text, as data: the report of `gqa-export long`.

Perplexity is exp of nats per token. The copy score tells what perplexity hides: a passage is repeated at the end of the
context, and the score is the share that is left of what the exact model gains by having seen it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

LEAST_GAIN = 0.1
"""nats that the exact model must gain on a repeated passage for a copy score to mean something"""


@dataclass(frozen=True)
class LayerQuality:
    """One layer, approximated from the exact model's own inputs.

    Attributes:
        layer: its number.
        error: median over rows of the relative error of the output. error_p99: what 99 % of the rows stay below.
        mass: share of the exact attention weights that lies on keys which are read with weight 1.
        alpha: the theorem's parameter, tokens times the largest squared column norm of the attention matrix; it must be
            far below the number of tokens. alpha_column: the key in whose column. alpha_rest: without the first 4 keys.
        log_kappa: logarithm of the ratio between the largest and the smallest row sum of what is not heavy.
        seconds: of the approximation, selection included. exact_seconds: of exact attention.
    """

    layer: int
    error: float
    error_p99: float
    mass: float
    alpha: float
    alpha_column: int
    alpha_rest: float
    log_kappa: float
    seconds: float
    exact_seconds: float


@dataclass(frozen=True)
class LengthQuality:
    """One length of prompt.

    Attributes:
        tokens: the length.
        exact_nll, nll: nats per token behind the first leaf. kl: from the exact model's distribution.
        top1: share of rows with the same best token, and by eighths of the positions `top1_by_position`.
        unseen: nats per token on the passage when it first comes. exact_copy, copy: when it is repeated at the end.
        exact_seconds, seconds: of the whole model.
        layers: every approximated layer.
    """

    tokens: int
    exact_nll: float
    nll: float
    kl: float
    top1: float
    top1_by_position: tuple[float, ...]
    unseen: float
    exact_copy: float
    copy: float
    exact_seconds: float
    seconds: float
    layers: tuple[LayerQuality, ...] = ()

    @property
    def loss(self) -> float:
        """Nats per token lost."""
        return self.nll - self.exact_nll

    @property
    def perplexity(self) -> float:
        """Of the approximated model."""
        return math.exp(self.nll)

    @property
    def exact_perplexity(self) -> float:
        """Of the exact one."""
        return math.exp(self.exact_nll)

    @property
    def copy_score(self) -> float | None:
        """1: copied as by the exact model, 0: as if never seen. None where the exact model gains too little."""
        gain = self.unseen - self.exact_copy
        return (self.unseen - self.copy) / gain if gain >= LEAST_GAIN else None


@dataclass(frozen=True)
class FewerLayers:
    """What is lost where only the last so many of the layers are approximated."""

    layers: int
    loss: float
    copy_score: float | None


@dataclass(frozen=True)
class LongQuality:
    """The report.

    Attributes:
        checkpoint, text: what was measured, on what.
        method, setting, seed: how attention is approximated. replaced: numbers of the layers.
        max_loss, min_copy: the bounds; None: no bound, but a loss that is not finite fails.
        lengths: each length.
        notes: what else a reader must know.
        fewer: the loss over the number of layers, at the shortest length.
        judge_copy: a copy score that has no meaning fails, because a bound for it was asked for.
    """

    checkpoint: str
    text: str
    method: str
    setting: dict[str, int]
    seed: int
    replaced: tuple[int, ...]
    max_loss: float | None
    min_copy: float | None
    lengths: tuple[LengthQuality, ...]
    notes: tuple[str, ...] = ()
    fewer: tuple[FewerLayers, ...] = ()
    judge_copy: bool = False

    @property
    def failures(self) -> tuple[str, ...]:
        """Every bound that is broken, with the reason that the layers give; () if none is."""
        return tuple(failure for each in self.lengths for name in ("loss", "copy")
                     if (failure := self.failure_of(each, name)))

    def failure_of(self, each: LengthQuality, name: str) -> str:
        """How a length breaks the bound of its "loss" or its "copy" score, in words; "" if it does not."""
        start = f"{each.tokens} tokens: "
        if name == "loss":
            if not math.isfinite(each.loss):
                return f"{start}the loss is not finite, whatever --max-loss is"
            if self.max_loss is not None and each.loss > self.max_loss:
                return (f"{start}{each.loss:+.4f} nats per token are beyond --max-loss {self.max_loss:g}"
                        f"{self._cause(each)}")
            return ""
        score = each.copy_score
        if self.min_copy is None or (score is None and not self.judge_copy):
            return ""
        if score is None:
            return (f"{start}the exact model gains less than {LEAST_GAIN:g} nats on a repeated passage, so that "
                    f"nothing can be held against --min-copy {self.min_copy:g}: measure another text or other lengths")
        if not score >= self.min_copy:  # NaN is below every bound
            return f"{start}the copy score {score:.3f} is below --min-copy {self.min_copy:g}{self._cause(each)}"
        return ""

    @property
    def passed(self) -> bool:
        """Whether every bound is kept."""
        return not self.failures

    def _cause(self, each: LengthQuality) -> str:
        if not each.layers:
            return ""
        worst = max(each.layers, key=lambda layer: layer.alpha)
        if worst.alpha < each.tokens:
            return ""
        remedy = " (--long-anchors 4 reads the first keys always)" if worst.alpha_column < 4 and not self.setting[
            "anchors"] else ""
        return (f"; alpha of layer {worst.layer} is {worst.alpha:.3g} in column {worst.alpha_column}, "
                f"{worst.alpha / each.tokens:.0f} times the number of tokens{remedy}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with what follows from the figures."""
        facts = asdict(self)
        for row, each in zip(facts["lengths"], self.lengths):
            row.update(loss=each.loss, perplexity=each.perplexity, exact_perplexity=each.exact_perplexity,
                       copy_score=each.copy_score)
        return {**facts, "failures": list(self.failures), "passed": self.passed}

    def __str__(self) -> str:
        """One line."""
        found = []
        for each in self.lengths:
            score = each.copy_score
            found.append(f"{each.tokens} tokens: {each.loss:+.4f} nats per token, perplexity "
                         f"{each.exact_perplexity:.4g} -> {each.perplexity:.4g}, KL {each.kl:.3g}, best token the same "
                         f"{100 * each.top1:.1f} %, copy score {'not judged' if score is None else f'{score:.3f}'}")
        return f"{'; '.join(found)}; on {self.text}"
