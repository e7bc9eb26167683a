"""The two verdicts on a bundle: does it compute what its weights mean, and is it as good as shipped as PyTorch is when
that rounds activations by the same rule? A bundle that rounds nothing has the first alone."""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.manifest import Manifest
from ..compare.case_verdict import EXACT, SHIPPED, CaseVerdict
from ..compare.cases import Plan
from ..compare.judge import judge
from ..graph_io import EXACT_PRODUCTS
from ..progress import Progress
from ..runtime.session import Session
from .accuracy_level import RoundInputs, at_level_zero, rounded_inputs
from .input_codes import SAME
from .overflow import overflow_words
from .reference import Reference
from .run_cases import run_cases
from .sessions import FillGarbage, Sessions, bundle_session, is_large


@dataclass(frozen=True)
class Comparison:
    """What does not change between the two. plan: the cases. manifest: of what is run. last_only, dtype, notes, report:
    as of `run_cases`. coded: the bundle's cache is quantized, whatever what is run holds: interpreted fp8 codes are
    the numbers that they stand for."""

    known: Reference
    plan: Plan
    manifest: Manifest
    last_only: bool
    dtype: str
    notes: list[str]
    report: Progress
    coded: bool = False

    def sessions(self, session: Session, fill_garbage: FillGarbage | None, follow: bool = True,
                 by_rule: bool = False) -> Sessions:
        """The three that walk in step. follow: as `Sessions` has it, where the cache is quantized. by_rule: see it."""
        follow = follow and self.coded
        return Sessions(self.known.session, self.known.eager, session, fill_garbage,
                        beside=self.manifest.engine is None and is_large(self.manifest), alike=self.known.alike,
                        follow=follow, count_codes=follow and self.dtype != "float32", by_rule=by_rule,
                        windows=(self.manifest.window_cache,) if self.manifest.window_cache else ())

    def exact(self, session: Session, fill_garbage: FillGarbage | None,
              part: str) -> tuple[tuple[CaseVerdict, ...], str]:
        """The verdict on a session that rounds nothing, and why its outputs are not finite (`overflow_words`). part:
        `EXACT` if another follows, else ""."""
        sessions = self.sessions(session, fill_garbage)
        logs = run_cases(sessions, self.plan, last_only=self.last_only, report=self.report, dtype=self.dtype,
                         notes=self.notes)
        verdicts = tuple(judge(log, self.dtype, part) for log in logs)
        self.notes.extend(beyond_bounds(verdicts, self.dtype))
        return verdicts, overflow_words(sessions, logs, self.dtype)

    def shipped(self, session: Session, fill_garbage: FillGarbage | None, *,
                alone: bool = False) -> tuple[tuple[CaseVerdict, ...], str]:
        """The verdict on a session as it is shipped, its activations rounded, and as of `exact`. alone: no other
        verdict follows the codes of a quantized cache and counts them."""
        eager: Any = self.known.eager
        if eager is None:
            self.notes.append("not compared as shipped: there is no room for PyTorch in the bundle's number format")
            return (), ""
        inputs = rounded_inputs(self.manifest, self.known.checkpoint, eager.model, self.known.inputs.codes)
        kinds = sorted({each.codes.kind for each in inputs.values() if each.codes})
        how = f"the type of their weight ({', '.join(kinds)})" if is_same(self.manifest) else "int8 (accuracy level 4)"
        self.notes.append(f"as shipped, the inputs of {len(inputs)} matrices are rounded to {how}; the baseline is "
                          "PyTorch with the same inputs rounded by the same rule")
        rounding = RoundInputs(inputs)
        # a scale that cuts inputs off moves PyTorch and the bundle alike: that they agree is no proof of a scale that
        # was held against nothing else; a block's own largest value, by which int8 is scaled, cuts nothing off
        with eager.under(rounding, "rounded") if inputs else nullcontext():
            sessions = self.sessions(session, fill_garbage, follow=alone,
                                     by_rule=bool(inputs) and self.known.inputs.proved)
            if sessions.follow:
                self.notes.append("rounded inputs move many codes of the cache in PyTorch too, and as many may be "
                                  "others here: validate the ONNX bundle that the engine was built from, too")
            logs = run_cases(sessions, self.plan, last_only=self.last_only, report=self.report, dtype=self.dtype,
                             part=SHIPPED, notes=self.notes)
        verdicts = tuple(judge(log, self.dtype, SHIPPED) for log in logs)
        self.notes.extend((*_missed(eager.model, inputs, rounding.met), *_dominated(verdicts),
                           *([] if self.known.inputs.proved else _undecided(verdicts))))
        return verdicts, overflow_words(sessions, logs, self.dtype) if alone else ""


def beyond_bounds(verdicts: tuple[CaseVerdict, ...], dtype: str) -> list[str]:
    """A line for every case that fails where PyTorch's own error is more than any bound allows."""
    found = ((case, max((kind for kind in case.kinds if not kind.passed and kind.basis == "cap"
                         and 0 < kind.bound < kind.same_dtype_baseline < math.inf),
                        key=lambda kind: kind.same_dtype_baseline / kind.bound, default=None)) for case in verdicts)
    return [f"{case.name}: PyTorch in {dtype} is itself off by {worst.same_dtype_baseline:.2g} in {worst.output}, more "
            f"than the {worst.bound:.2g} that any bound allows: this model amplifies rounding so far that no export in "
            "this number format could pass, right or wrong" + ("" if dtype == "float32" else " (--as fp32 compares the "
            "graph in fp32)") for case, worst in found if worst]


def _missed(model: Any, inputs: Collection[int], met: Collection[int]) -> list[str]:
    """A line that names the matrices whose inputs the baseline was to round, and whose products it did not meet; none
    where nothing ran. inputs, met: ids of parameters."""
    looked_up = id(model.get_input_embeddings().weight)  # a graph of DequantizeLinear names it, and it is no product
    names = [name for name, parameter in model.named_parameters()
             if id(parameter) in inputs and id(parameter) not in met and id(parameter) != looked_up]
    return [f"PyTorch reads {len(names)} of them in another way than a product, and does not round their inputs: "
            f"{', '.join(names)}"] if met and names else []


def _dominated(verdicts: tuple[CaseVerdict, ...]) -> list[str]:
    """A line for every case whose logits the rounding of activations moves so far that nothing finer can be told."""
    found = {"activations": "the bundle's are off by {:.2g}",
             "rule": "the bundle's are within {:.2g} of PyTorch's by the same rule"}
    return [f"{case.name}: rounded inputs alone move PyTorch's logits by up to {case.logits.same_dtype_baseline:.2g}; "
            f"{found[case.logits.basis].format(case.logits.max_abs)}. --activations exact avoids both"
            for case in verdicts if case.logits.basis in found] + [
        f"{case.name}: rounded inputs move {', '.join(case.ranged)} of PyTorch by as much as the largest value: held "
        "to the range of values alone; the logits that come of them were judged" for case in verdicts if case.ranged]


def _undecided(verdicts: tuple[CaseVerdict, ...]) -> list[str]:
    """A line where cases failed that PyTorch by the same rule could have decided, had the scales been proved."""
    names = [case.name for case in verdicts
             if any(not kind.passed and kind.basis == "activations" and kind.bound <= kind.same_dtype_baseline
                    for kind in case.kinds)]
    return [f"{', '.join(names)}: rounded inputs move PyTorch by as much as the largest value, and whether the bundle "
            "does the same tells nothing as long as the scales were held against nothing but what the bundle says: "
            "validate with --calibrate TEXT"] if names else []


def exact_session(stack: ExitStack, folder: Path, manifest: Manifest, provider: str, notes: list[str],
                  target: Any, opened: list[Any] | None = None) -> tuple[Session, FillGarbage | None]:
    """A bundle's session in which no matrix product rounds its input. Arguments as of `bundle_session`."""
    ran, where, changed = stack.enter_context(at_level_zero(folder, manifest))
    if changed:
        notes.append(f"export exact: {changed} roundings of products' inputs were left out in memory"
                     if is_same(manifest) else
                     f"export exact: the accuracy level of {changed} matrix products was set to 0 in memory")
    return stack.enter_context(bundle_session(where, ran, provider, notes, target, dict(EXACT_PRODUCTS), opened))


def activations_of(manifest: Manifest, rounds: bool) -> str:
    """See `Verdict.activations`."""
    if manifest.quantization is None:
        return "int8" if rounds else ""
    return (SAME if is_same(manifest) else "int8") if rounds else "exact"


def rounds_for_good(manifest: Manifest) -> bool:
    """Whether an engine rounds inputs of products, which cannot be left out of it. With the option and without scales
    it does not."""
    return manifest.engine is not None and manifest.quantization is not None and any(
        weight.inputs for weight in manifest.quantization.weights)


def is_same(manifest: Manifest) -> bool:
    """Whether inputs have the type of their weight, where they are rounded."""
    return manifest.quantization is not None and manifest.quantization.activations == SAME


__all__ = ["EXACT", "SHIPPED", "Comparison", "activations_of", "beyond_bounds", "exact_session", "is_same",
           "rounds_for_good"]
