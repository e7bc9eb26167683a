"""What an export lost against the model before it was quantized, measured on text: KL divergence, best tokens,
perplexity.

A measurement, not a comparison: it fails only against a limit that the user gave, or where numbers are not finite.
Whether the export computes what its own weights mean is the verdict's cases' affair. Dimensions: T tokens, V
vocabulary. Everything in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .logits import MOST_TOKENS, log_softmax

NOT_MEASURED = "not measured (--reference CHECKPOINT measures it, against the checkpoint before it was quantized)"
SHIPPED_TEXT = "the shipped text"
"""what a report calls the text that comes with the package"""


@dataclass(frozen=True)
class Loss:
    """A measured loss.

    Attributes:
        reference: the checkpoint it was measured against. reference_dtype: PyTorch's number format there.
        text: the text's file name, or "the shipped text". text_sha256: of the token ids that were read.
        tokens: predictions that were compared. windows: pieces of text, each read with an empty cache.
        kl_mean, kl_p99, kl_max: KL divergence in nats of the bundle's prediction from the reference's, per token.
        top1: share of the tokens with the same best token.
        perplexity_reference, perplexity: the reference's and the bundle's on this text.
        limit_kl, limit_perplexity_increase: most that `kl_mean`, and the increase of perplexity in percent, may be;
            None: no limit.
    """

    reference: str
    reference_dtype: str
    text: str
    text_sha256: str
    tokens: int
    windows: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    perplexity_reference: float
    perplexity: float
    limit_kl: float | None = None
    limit_perplexity_increase: float | None = None

    @property
    def perplexity_increase(self) -> float:
        """How much larger the bundle's perplexity is, in percent of the reference's."""
        return 100 * (self.perplexity / self.perplexity_reference - 1)

    @property
    def failure(self) -> str:
        """Which limit was exceeded, in words; "" if none was."""
        found = (self.kl_mean, self.kl_p99, self.kl_max, self.perplexity)
        if not np.isfinite(found).all():
            return "the loss is not finite: the bundle's logits are NaN or infinite"
        if self.limit_kl is not None and not self.kl_mean <= self.limit_kl:
            return f"mean KL divergence {self.kl_mean:.4g}, at most {self.limit_kl:g} (--max-kl)"
        most = self.limit_perplexity_increase
        if most is not None and not self.perplexity_increase <= most:
            return (f"perplexity increased by {self.perplexity_increase:.3g} %, at most {most:g} % "
                    "(--max-perplexity-increase)")
        return ""

    @property
    def passed(self) -> bool:
        """Whether every number is finite and within the limits."""
        return not self.failure

    def __str__(self) -> str:
        return (f"KL mean {self.kl_mean:.3g}, p99 {self.kl_p99:.3g}; best token the same {100 * self.top1:.1f} %; "
                f"perplexity {self.perplexity_reference:.4g} -> {self.perplexity:.4g} "
                f"({self.perplexity_increase:+.2f} %); {self.tokens} tokens of {self.text}, against PyTorch "
                f"{self.reference_dtype} of {self.reference}")


def loss_label(loss: Loss | None) -> str:
    """A loss in one line, or that there is none."""
    return NOT_MEASURED if loss is None else str(loss)


class LossTally:
    """Adds up a loss piece by piece; keeps one number per token and one row of logits per side."""

    def __init__(self) -> None:
        self.divergences: list[np.ndarray] = []
        self.agreed, self.tokens = 0, 0
        self.losses = np.zeros(2)
        self._last: tuple[np.ndarray, np.ndarray] | None = None

    def begin(self) -> None:
        """What follows is another window: nothing predicts its first token."""
        self._last = None

    def add(self, ids_T: np.ndarray, expected_TV: np.ndarray, got_TV: np.ndarray) -> None:
        """The next piece of a window. Logits at t predict the token at t + 1: those of the last are kept for it."""
        wanted_T = ids_T if self._last is not None else ids_T[1:]
        sides = [np.concatenate([last[None], side]) if last is not None else side for side, last in
                 zip((expected_TV, got_TV), self._last or (None, None))]
        for start in range(0, len(wanted_T), MOST_TOKENS):
            rows = slice(start, min(start + MOST_TOKENS, len(wanted_T)))
            self._add(wanted_T[rows], *(side[rows].astype(np.float64) for side in sides))
        self._last = (np.array(expected_TV[-1]), np.array(got_TV[-1]))

    def _add(self, wanted_T: np.ndarray, expected_TV: np.ndarray, got_TV: np.ndarray) -> None:
        line = np.arange(len(wanted_T))
        with np.errstate(all="ignore"):
            a, b = log_softmax(expected_TV), log_softmax(got_TV)
            # a token that the reference holds to be impossible adds nothing, whatever the bundle gives it
            kl = np.where(np.isneginf(a), 0.0, np.exp(a) * (a - b)).sum(1)
        self.divergences.append(np.where(np.isnan(kl), np.inf, np.maximum(kl, 0.0)))
        self.losses -= [np.nan_to_num(side[line, wanted_T], nan=-np.inf, neginf=-np.inf).sum() for side in (a, b)]
        self.agreed += int((expected_TV.argmax(1) == got_TV.argmax(1)).sum())
        self.tokens += len(wanted_T)

    def loss(self, reference: str, reference_dtype: str, text: str, text_sha256: str, windows: int,
             limit_kl: float | None, limit_perplexity_increase: float | None) -> Loss:
        """The sums as means; arguments as `Loss` has them."""
        kl = np.concatenate(self.divergences)
        with np.errstate(over="ignore", invalid="ignore"):
            before, after = (float(np.exp(loss / self.tokens)) for loss in self.losses)
            p99 = float(np.percentile(kl, 99)) if np.isfinite(kl).all() else float(np.inf)
        return Loss(reference, reference_dtype, text, text_sha256, self.tokens, windows, float(kl.mean()), p99,
                    float(kl.max()), self.agreed / self.tokens, before, after, limit_kl, limit_perplexity_increase)
