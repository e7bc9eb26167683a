"""The judgement as data: what was compared, per case and kind of output, and where it first went wrong.

`Verdict.to_dict` is the schema of `--json`; `SCHEMA_VERSION` counts its incompatible changes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..errors import EXIT_DIFFERENT, EXIT_PASSED, OutputDiffers
from .case_driver import Choice
from .error_trace import OutputError, StepError, Surroundings
from .logits import LogitMetrics
from .loss import Loss, loss_label

SCHEMA_VERSION = 2
COMPARED = (("logits", {"logits"}), ("new keys and values", {"keys", "values"}), ("states", {"states"}),
            ("cache", {"cache"}), ("refusals", {"refusal"}))
"""words in which a verdict tells what was compared, and the kinds of output that must have been measured"""

LOSS_PROPERTIES = ("perplexity_increase", "failure", "passed")
"""properties of a loss that `Verdict.to_dict` writes beside its fields"""


@dataclass(frozen=True)
class Location:
    """One element by name.

    Attributes:
        step, phase: "prefill", "decode", or "cache": the whole cache at the end.
        output: such as "layer 3 key" or "logits".
        axes: batch, token (its place in the sequence), head, feature; or batch, token, id.
        max_abs: how far off it is. bound: how far it may be. nonfinite: elements that are NaN or infinite.
    """

    case: str
    step: int
    phase: str
    output: str
    axes: dict[str, int]
    expected: float
    got: float
    max_abs: float
    bound: float
    nonfinite: int = 0

    @property
    def order(self) -> tuple[int, str]:
        """Sorts outputs of one step as they are computed: layer by layer, logits last."""
        digits = [word for word in self.output.split() if word.isdigit()]
        return (int(digits[0]) if digits else 1 << 30, self.output)

    def __str__(self) -> str:
        if self.phase == "refusal":
            return f"case {self.case}: {self.output}: was answered, and must be refused"
        place = ", ".join(f"{name} {value}" for name, value in self.axes.items())
        if self.nonfinite:
            wrong = f"got {self.got:g}, expected {self.expected:g} ({self.nonfinite} elements are NaN or infinite)"
        else:
            wrong = (f"got {self.got:.9g}, expected {self.expected:.9g} "
                     f"(off by {self.max_abs:.3g}, allowed {self.bound:.3g})")
        return f"case {self.case}, step {self.step} ({self.phase}), {self.output}, {place}: {wrong}"


@dataclass(frozen=True)
class KindVerdict:
    """All outputs of one kind in one case; the numbers are those of the output nearest to (or farthest past) its bound.

    Attributes:
        kind: "keys", "values", "states", "logits", "cache" or "refusal".
        max_abs: the largest |got - expected|. bound: what it may reach.
        same_dtype_baseline: the largest error of PyTorch in the number format that was run. basis: what decided the
            bound: "baseline", "floor" or "cap".
        first: where it first exceeded the bound; None: nowhere.
        around: both sides around the largest error; None where there is none.
    """

    kind: str
    output: str
    max_abs: float
    bound: float
    same_dtype_baseline: float
    basis: str
    first: Location | None
    around: Surroundings | None = None

    @property
    def passed(self) -> bool:
        """Whether every output of this kind stayed within its bound, and finite."""
        return self.first is None


@dataclass(frozen=True)
class CaseVerdict:
    """One case.

    Attributes:
        free: each side fed its own best token.
        rows: best tokens that were compared. top1_agreed: those that were the same.
        ties: best tokens that differ where the reference's own preference is below the bound of the logits.
        parted: the first best token of a free run that differs and is not a tie.
        eager_logits: largest difference of the logits to PyTorch in the number format that was run.
        outputs, trail: the errors of every output and of every step.
        entry: the line of the suite it belongs to.
    """

    name: str
    purpose: str
    batch: int
    prompt_lengths: tuple[int, ...]
    steps: int
    free: bool
    kinds: tuple[KindVerdict, ...]
    rows: int
    top1_agreed: int
    ties: tuple[Choice, ...]
    parted: Choice | None
    eager_logits: float | None
    seconds: float
    outputs: tuple[OutputError, ...] = ()
    trail: tuple[StepError, ...] = ()
    metrics: LogitMetrics | None = None
    entry: str = ""

    @property
    def first(self) -> Location | None:
        """The earliest step, and in it the earliest output in the order of computation, that left its bound."""
        found = [kind.first for kind in self.kinds if kind.first is not None]
        return min(found, key=lambda f: (f.step, f.phase == "cache", f.order)) if found else None

    @property
    def passed(self) -> bool:
        """Whether every output stayed within its bound and, in a free run, no token differed but by a tie."""
        return all(kind.passed for kind in self.kinds) and self.parted is None

    @property
    def logits(self) -> KindVerdict:
        """The verdict on the logits."""
        return next(kind for kind in self.kinds if kind.kind == "logits")

    @property
    def wrong_token(self) -> str:
        """The step of a free run whose best token is wrong, in words; "" where there is none."""
        if self.parted is None:
            return ""
        choice = self.parted
        return (f"case {self.name}, step {choice.step}, batch {choice.row}: best token {choice.got}, expected "
                f"{choice.expected} (preferred by {choice.margin:.3g}, no tie)")


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
        loss: what was lost against the checkpoint before it was quantized; None where that was not measured.
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

    @property
    def same(self) -> bool:
        """Whether all cases passed. A verdict without cases has shown nothing and does not pass."""
        return bool(self.cases) and all(case.passed for case in self.cases)

    @property
    def passed(self) -> bool:
        """Whether all cases passed, and the loss is within its limits where it was measured."""
        return self.same and (self.loss is None or self.loss.passed)

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
        at the end), "refusals", "best tokens" (of a free run), "perplexity" (of a given text), "loss" (against another
        checkpoint). What is not named was not compared."""
        measured = {kind.kind for case in self.cases for kind in case.kinds}
        found = [words for words, kinds in COMPARED if kinds <= measured]
        if any(case.free and case.rows for case in self.cases):
            found.append("best tokens")
        if any(case.metrics is not None and case.metrics.perplexity is not None for case in self.cases):
            found.append("perplexity")
        if self.loss is not None:
            found.append("loss")
        return tuple(found)

    @property
    def failure(self) -> str:
        """The first thing that went wrong, in words; "" for a verdict that passed."""
        if self.passed:
            return ""
        wrong = next((case for case in self.cases if not case.passed), None)
        if wrong is None and self.same and self.loss is not None:
            return self.loss.failure
        if wrong is None:
            return "no case was run"
        found = wrong.wrong_token if wrong.first is None else str(wrong.first)
        return f"{self.overflow}. {found}" if self.overflow else found

    def check(self) -> Verdict:
        """This verdict, if it passed.

        Raises:
            OutputDiffers: it did not pass; `what` is the first failure.
        """
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
            "schema_version": SCHEMA_VERSION, "passed": self.passed, "exit_code": self.exit_code,
            "compared": self.compared,
            "max_abs_logits": self.max_abs_logits, "max_abs_logits_eager": self.max_abs_logits_eager,
            "first": asdict(self.first) if self.first else None, "cases": cases, "loss_label": self.loss_label,
        }
        return _plain(data)

    def to_json(self) -> str:
        """`to_dict` as a JSON document."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, np.generic):
        data = data.item()
    return str(data) if isinstance(data, float) and not np.isfinite(data) else data
