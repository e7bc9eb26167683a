"""What a comparison with the checkpoint found, as a bundle carries it: both verdicts, and what was lost.

Whoever gets the bundle reads there what was found, and by which suite. It is a record and no proof: a manifest can be
edited, and `gqa-export validate` tells again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ..spec import STRICT, Count, Limits, Text

MOST = 1e30
Number = Annotated[float, Limits(ge=-MOST, le=MOST)]


@dataclass(frozen=True)
class RecordedLoss:
    """What the bundle lost against a checkpoint from before it was quantized.

    Attributes:
        reference: that checkpoint. text: the file, or "the shipped text". tokens: predictions that were compared.
        kl_mean, kl_p99: KL divergence in nats per token. top1: share of tokens with the same best token.
        perplexity_increase: in percent.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    reference: Text
    text: Text
    tokens: Count
    kl_mean: Number
    kl_p99: Number
    top1: Number
    perplexity_increase: Number


@dataclass(frozen=True)
class RecordedVerdict:
    """What `validate` found.

    Attributes:
        passed: every case, and every limit of what may be lost.
        level: of the suite. cases: of it.
        dtype: number format that was run. reference_dtype: of the reference. provider: where it was run.
        activations: how the inputs of quantized products are rounded as shipped; "": nothing is quantized.
        export_exact: whether the bundle computes what its weights mean. as_shipped: whether it is as good as PyTorch
            that rounds inputs by the same rule. None: there is no such verdict.
        loss: None: not measured.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    passed: bool
    level: Text
    cases: Count
    dtype: Text
    reference_dtype: Text
    provider: Text
    activations: Text = ""
    export_exact: bool | None = None
    as_shipped: bool | None = None
    loss: RecordedLoss | None = None

    def __str__(self) -> str:
        def words(name: str, passed: bool | None) -> list[str]:
            return [] if passed is None else [f"{name} {'passed' if passed else 'DIFFERENT'}"]

        lost = "not measured" if self.loss is None else (
            f"KL mean {self.loss.kl_mean:.3g}, perplexity {self.loss.perplexity_increase:+.2f} %")
        return "; ".join([f"{'PASSED' if self.passed else 'DIFFERENT'} in {self.dtype}, level {self.level}, "
                          f"{self.cases} cases", *words("export exact", self.export_exact),
                          *words("as shipped", self.as_shipped), *([f"loss: {lost}"] if self.activations else [])])
