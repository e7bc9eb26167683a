"""The judgement as data: what was compared, per case and kind of output, and where it first went wrong.

`Verdict.to_dict` is the schema of `--json`; `SCHEMA_VERSION` counts its incompatible changes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import EXIT_DIFFERENT, EXIT_PASSED, OutputDiffers
from .case_verdict import EXACT, SHIPPED, CaseVerdict, Location
from .long_quality import LongQuality
from .loss import Loss, loss_label
from .plain import plain

SCHEMA_VERSION = 2
COMPARED = (("logits", {"logits"}), ("new keys and values", {"keys", "values"}), ("states", {"states"}),
            ("hidden states", {"hidden states"}), ("cache", {"cache"}), ("refusals", {"refusal"}))
"""words in which a verdict tells what was compared, and the kinds of output that must have been measured"""

UNROUNDED = "exact"
"""`Verdict.activations` of a quantized bundle that does not round the inputs of its products"""

LOSS_PROPERTIES = ("perplexity_increase", "failure", "passed")
"""properties of a loss that `Verdict.to_dict` writes beside its fields"""


@dataclass(frozen=True)
class Verdict:
    """The whole validation.

    Attributes:
        bundle, against: folders, or the name of a checkpoint.
        dtype: the bundle's number format. checked_dtype: the one that was run (`--as`). reference_dtype: PyTorch's.
        provider: of ONNX Runtime, or the flavour of an engine. cache: "growing" or "static". capacity: in tokens.
        cases: in the order in which they ran. notes: what a reader must know, such as what was not compared.
        versions: of the packages that took part. level: "quick" or "full".
        identity: sha256 over the checkpoint's configuration and weights and over what the export chose (logits and
            weights), so that bundles are told apart whatever their folders are called; "" where no checkpoint was open.
        overflow: why outputs are not finite where PyTorch's own in this number format are not either, and the option
            that avoids it; "" otherwise.
        activations: "int8": the bundle rounds the inputs of quantized matrix products to int8; "same": to the type of
            their weight; "exact": it holds quantized matrices and does not; "": its weights are not quantized.
        loss: what was lost against the checkpoint before it was quantized; None where that was not measured.
        approximated: the method by which the bundle reads long prompts; "": it reads every key.
        long: what that costs the model on a text; None where it was not measured, and `long_missing` says why.
    """

    bundle: str
    against: str
    target: str
    dtype: str
    checked_dtype: str
    reference_dtype: str
    provider: str
    cache: str
    capacity: int
    cases: tuple[CaseVerdict, ...]
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    level: str = ""
    identity: str = ""
    overflow: str = ""
    loss: Loss | None = None
    activations: str = ""
    approximated: str = ""
    long: LongQuality | None = None
    long_missing: str = ""

    @property
    def same(self) -> bool:
        """Whether all cases passed. A verdict without cases has shown nothing and does not pass."""
        return bool(self.cases) and all(case.passed for case in self.cases)

    @property
    def passed(self) -> bool:
        """Whether all cases passed, and what was lost is within its limits where it was measured."""
        return self.same and not self.lost

    @property
    def lost(self) -> tuple[str, ...]:
        """Every limit of what may be lost that was exceeded, in words."""
        loss = () if self.loss is None or self.loss.passed else (self.loss.failure,)
        return (*loss, *(() if self.long is None else self.long.failures))

    @property
    def long_label(self) -> str:
        """What approximate attention costs, in one line, or that it was not measured; "" where there is none."""
        if not self.approximated:
            return ""
        return f"not measured ({self.long_missing})" if self.long is None else f"{self.approximated}: {self.long}"

    @property
    def export_exact(self) -> bool | None:
        """Whether a quantized bundle computes what its weights mean, activations not rounded. It is the whole verdict
        on one that rounds none. None: its weights are not quantized, or an engine's rounding could not be left out."""
        return self.part_passed("" if self.activations == UNROUNDED else EXACT)

    @property
    def as_shipped(self) -> bool | None:
        """Whether the bundle as it is shipped is as good as PyTorch with its activations rounded by the same rule.
        None: it rounds none."""
        return self.part_passed(SHIPPED)

    def part_passed(self, part: str) -> bool | None:
        """Whether the cases of "export exact" or of "as shipped" passed, or of neither (""), where calls that must be
        refused show nothing of the numbers; None where there are none."""
        found = [case.passed for case in self.cases if case.part == part
                 and {kind.kind for kind in case.kinds} != {"refusal"}]
        return all(found) if found else None

    @property
    def loss_label(self) -> str:
        """The loss in one line, or that it was not measured."""
        return loss_label(self.loss)

    @property
    def exit_code(self) -> int:
        """0 passed, 1 outputs differ."""
        return EXIT_PASSED if self.passed else EXIT_DIFFERENT

    @property
    def compared(self) -> tuple[str, ...]:
        """What was measured in this run, in words: "logits", "new keys and values" (of every step), "cache" (all of it,
        at the end), "refusals", "best tokens" (of a free run), "perplexity" (of a given text), "export exact" (of a
        quantized bundle) and "as shipped" (of one that rounds activations), "loss" (against another checkpoint), "loss
        on long prompts" (of approximate against exact attention). What is not named was not compared."""
        measured = {kind.kind for case in self.cases for kind in case.kinds}
        found = [words for words, kinds in COMPARED if kinds <= measured]
        if any(case.free and case.rows for case in self.cases):
            found.append("best tokens")
        if any(case.metrics is not None and case.metrics.perplexity is not None for case in self.cases):
            found.append("perplexity")
        found += [part for part, passed in ((EXACT, self.export_exact), (SHIPPED, self.as_shipped))
                  if passed is not None]
        if self.loss is not None:
            found.append("loss")
        if self.long is not None:
            found.append("loss on long prompts")
        return tuple(found)

    @property
    def failure(self) -> str:
        """The first thing that went wrong, in words; "" for a verdict that passed."""
        if self.passed:
            return ""
        wrong = next((case for case in self.cases if not case.passed), None)
        if wrong is None and self.lost:
            return self.lost[0]
        if wrong is None:
            return "no case was run"
        found = wrong.wrong_token if wrong.first is None else str(wrong.first)
        return f"{self.overflow}. {found}" if self.overflow else found

    def check(self) -> Verdict:
        """This verdict, if it passed.

        Raises:
            OutputDiffers: it did not pass; `what` is the first failure.
        """
        if self.same and self.long is not None and self.failure in self.long.failures:
            raise OutputDiffers(f"approximate attention loses more than was allowed: {self.failure}", self.bundle,
                                "export with fewer --long-layers, or with more --long-heavy and --long-samples",
                                code="E-VALIDATE-LONG-LOSS")
        if self.same and not self.passed:
            raise OutputDiffers(f"the bundle lost more than was allowed: {self.failure}", self.bundle,
                                "quantize fewer matrices, or to more bits", code="E-VALIDATE-LOSS")
        if not self.passed:
            raise OutputDiffers(f"the bundle's outputs differ from the reference's: {self.failure}", self.bundle,
                                "export in a number format with larger numbers" if self.overflow else
                                f"find the layer: gqa-export bisect {self.bundle} --against {self.against}",
                                code="E-VALIDATE-DIFFERS")
        return self

    @property
    def max_abs_logits(self) -> float:
        """Largest |logit difference| to PyTorch (the reference) in all cases."""
        return max((kind.max_abs for case in self.cases for kind in case.kinds if kind.kind == "logits"),
                   default=float("nan"))

    @property
    def max_abs_logits_eager(self) -> float | None:
        """Largest |logit difference| to PyTorch eager in the number format that was run."""
        known = [case.eager_logits for case in self.cases if case.eager_logits is not None]
        return max(known) if known else None

    @property
    def first(self) -> Location | None:
        """Where the first failing case first diverged."""
        return next((case.first for case in self.cases if case.first is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Numbers that are not finite become strings ("inf", "nan")."""
        cases = []
        for case in self.cases:
            row = asdict(case)
            row["kinds"] = [asdict(kind) | {"passed": kind.passed} for kind in case.kinds]
            cases.append(row | {"passed": case.passed, "first": asdict(case.first) if case.first else None})
        loss = self.loss
        data = asdict(self) | {
            "loss": None if loss is None else asdict(loss) | {name: getattr(loss, name) for name in LOSS_PROPERTIES},
            "long": None if self.long is None else self.long.to_dict(), "long_label": self.long_label,
            "schema_version": SCHEMA_VERSION, "passed": self.passed, "exit_code": self.exit_code,
            "compared": self.compared,
            "max_abs_logits": self.max_abs_logits, "max_abs_logits_eager": self.max_abs_logits_eager,
            "first": asdict(self.first) if self.first else None, "cases": cases, "loss_label": self.loss_label,
            "export_exact": self.export_exact, "as_shipped": self.as_shipped,
        }
        return plain(data)

    def to_json(self) -> str:
        """`to_dict` as a JSON document."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
