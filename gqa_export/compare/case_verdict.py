"""The judgement on one case as data: per kind of output how far off it was, how far it may be, and where it went
wrong."""

from __future__ import annotations

from dataclasses import dataclass

from .case_driver import Choice
from .error_trace import OutputError, StepError, Surroundings
from .logits import LogitMetrics

EXACT, SHIPPED = "export exact", "as shipped"
"""the two verdicts on a bundle that rounds its activations: with that switched off, and with it"""


@dataclass(frozen=True)
class Location:
    """One element by name.

    Attributes:
        step, phase: "prefill", "decode", or "cache": the whole cache at the end; "codes": all codes that were written.
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
        if self.phase == "codes":
            return (f"case {self.case}: {self.got:.1%} of the {self.output} are not those nearest to the reference's "
                    f"keys and values, allowed {self.bound:.1%} (PyTorch in the same number format: "
                    f"{self.expected:.1%}): the bundle rounds or scales them wrongly")
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
        kind: "keys", "values", "states", "hidden states", "logits", "cache", "refusal", or "codes": then
            the numbers are shares of the codes of a quantized cache (`gqa_export.compare.code_share`).
        max_abs: the largest |got - expected|. bound: what it may reach.
        same_dtype_baseline: the largest error of PyTorch in the number format that was run. basis: what decided the
            bound: see `Tolerance`.
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
        part: of a bundle that rounds its activations, "export exact" (they were not rounded) or "as shipped"; else "".
        ranged: outputs held to the range of their values alone, because rounding moves PyTorch's by all of it.
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
    part: str = ""
    ranged: tuple[str, ...] = ()

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
