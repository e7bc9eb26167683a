"""The errors of a good run, kept in a file under version control: a later run that is clearly worse fails, although
it may still be within the tolerance.

How much worse: rounding differs from machine to machine and from kernel to kernel, so a drift is an error that is
more than FACTOR times the one that was kept, and more than FLOOR of what the tolerance allows (below that it is
noise of a few units in the last place). Fewer agreeing best tokens, or a case that no longer runs, are drifts too; so
is a loss on the same text that is more than FACTOR times the one that was kept, and more than KL_FLOOR or
INCREASE_FLOOR.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compare.case_verdict import CaseVerdict
from ..compare.verdict import Verdict
from ..errors import GqaExportError, cause_of

FORMAT = 2
BY_NAME = 1
"""the format in which bundles were told apart by their folder's name alone"""
FACTOR = 2.0
FLOOR = 0.02
KL_FLOOR = 1e-4
"""nats: a tenth of what rounding activations to 8 bits costs a small model"""
INCREASE_FLOOR = 0.1
"""percent of perplexity: what one text in place of another moves it by"""
REMAKE = "make it with --baseline FILE --update-baseline"
ANEW = f"remove the file, then {REMAKE}"


@dataclass(frozen=True)
class Drift:
    """One thing that left the baseline. bundle: its key. case "": the whole bundle. name: of the bundle's folder."""

    bundle: str
    case: str
    message: str
    name: str = ""

    def __str__(self) -> str:
        place = f"case {self.case}, " if self.case else ""
        return f"{self.name} {self.bundle}: {place}{self.message}".lstrip()


def key_of(verdict: Verdict) -> str:
    """What a bundle is called in a baseline: the checkpoint's and the export's digest, and everything that changes its
    rounding. Folders and their names are not in it: two bundles called `model` are two, a moved one is the same."""
    facts = (verdict.target, verdict.dtype, *([f"as {verdict.checked_dtype}"] if verdict.checked_dtype != verdict.dtype
                                              else []), verdict.cache, f"capacity {verdict.capacity}", verdict.provider)
    return f"{verdict.identity[:16] or 'unknown'} ({', '.join(facts)})"


class Baseline:
    """A baseline file: {"format", "bundles": {key: {"name", "cases": {case: {"best_tokens", "max_abs": {kind:
    number}}}}}}. name: of the folder when it was made, for people."""

    def __init__(self, bundles: dict[str, Any], where: str) -> None:
        self.bundles, self.where = bundles, where

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Read and check a file; GqaExportError where it is not a baseline."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise GqaExportError("the baseline does not exist", str(path), REMAKE,
                                 code="E-REPORT-BASELINE-MISSING") from error
        except (OSError, ValueError, RecursionError) as error:
            raise GqaExportError(f"the baseline cannot be read: {cause_of(error)}", str(path), ANEW,
                                 code="E-REPORT-BASELINE-READ") from error
        if isinstance(data, dict) and data.get("format") == BY_NAME:
            raise GqaExportError("this baseline has format 1, which tells bundles apart by their folder's name alone: "
                                 "bundles of one name replaced each other in it", str(path), REMAKE,
                                 code="E-REPORT-BASELINE-OLD")
        if not isinstance(data, dict) or data.get("format") != FORMAT or not _sound(data.get("bundles")):
            raise GqaExportError(f"this is not a baseline of format {FORMAT}", str(path), ANEW,
                                 code="E-REPORT-BASELINE-FORMAT")
        return cls(data["bundles"], str(path))

    @classmethod
    def update(cls, path: Path, verdicts: Sequence[Verdict]) -> tuple[str, ...]:
        """Put passed verdicts into a file, beside those of other bundles; notes on what was (not) kept."""
        from ..files.write_text import write_text

        old: tuple[str, ...] = ()
        try:
            bundles = cls.read(path).bundles if path.exists() else {}
        except GqaExportError as error:
            if error.code != "E-REPORT-BASELINE-OLD":
                raise
            bundles, old = {}, ("the file had format 1, whose entries name no bundle for certain: all were dropped, "
                                "update it with every bundle that it is for",)
        wrong = [verdict for verdict in verdicts if not verdict.passed]
        if wrong:
            return (f"the baseline was left as it was: {Path(wrong[0].bundle).name} did not pass",)
        for verdict in verdicts:
            cases = {case.name: _kept(case) for case in verdict.cases}
            bundles[key_of(verdict)] = {"name": Path(verdict.bundle).name, "cases": cases, **_kept_loss(verdict)}
        write_text(path, json.dumps({"format": FORMAT, "bundles": dict(sorted(bundles.items()))}, indent=1) + "\n")
        return (*old, f"baseline written: {path} ({', '.join(key_of(verdict) for verdict in verdicts)})")

    def judge(self, verdicts: Sequence[Verdict]) -> tuple[tuple[Drift, ...], tuple[str, ...]]:
        """What left the baseline, and notes on what it does not know. GqaExportError for a bundle not in it."""
        drifts: list[Drift] = []
        notes: list[str] = []
        for verdict in verdicts:
            key = key_of(verdict)
            if key not in self.bundles:
                raise GqaExportError(f"the baseline does not contain {key}",
                                     f"{self.where}: {', '.join(self.bundles)}",
                                     "validate the bundle against the checkpoint that the baseline was made with, or "
                                     + REMAKE,
                                     code="E-REPORT-BASELINE-BUNDLE")
            kept = self.bundles[key]["cases"]
            found = {case.name: case for case in verdict.cases}
            drifts += [Drift(key, "", message, Path(verdict.bundle).name)
                       for message in _drifted_loss(verdict, self.bundles[key].get("loss"))]
            folder = Path(verdict.bundle).name
            drifts += [Drift(key, name, "it is in the baseline and was not run", folder)
                       for name in kept if name not in found]
            notes += [f"the baseline does not contain case {name} of {key}" for name in found if name not in kept]
            for name in found.keys() & kept.keys():
                drifts += [Drift(key, name, message, folder) for message in _drifted(found[name], kept[name])]
        return tuple(drifts), tuple(notes)


def _kept(case: CaseVerdict) -> dict[str, Any]:
    kinds = {kind.kind for kind in case.kinds}
    return {"best_tokens": f"{case.top1_agreed}/{case.rows}",
            "max_abs": {name: max(kind.max_abs for kind in case.kinds if kind.kind == name) for name in sorted(kinds)}}


def _kept_loss(verdict: Verdict) -> dict[str, Any]:
    loss = verdict.loss
    return {} if loss is None else {"loss": {"text_sha256": loss.text_sha256, "kl_mean": loss.kl_mean,
                                             "perplexity_increase": loss.perplexity_increase}}


def _drifted_loss(verdict: Verdict, kept: dict[str, Any] | None) -> list[str]:
    if kept is None:
        return []
    loss = verdict.loss
    if loss is None:
        return ["the loss is in the baseline and was not measured (--reference)"]
    if loss.text_sha256 != kept["text_sha256"]:
        return [f"the loss was measured on other tokens than in the baseline: {loss.text}"]
    found = []
    if not loss.kl_mean <= max(FACTOR * kept["kl_mean"], KL_FLOOR):
        found.append(f"the mean KL divergence is {loss.kl_mean:.3g}, {kept['kl_mean']:.3g} in the baseline")
    before = kept["perplexity_increase"]
    if not loss.perplexity_increase <= max(FACTOR * before, before + INCREASE_FLOOR):
        found.append(f"the perplexity increased by {loss.perplexity_increase:.3g} %, by {before:.3g} % in the baseline")
    return found


def _drifted(case: CaseVerdict, kept: dict[str, Any]) -> list[str]:
    found = []
    agreed, rows = (int(number) for number in kept["best_tokens"].split("/"))
    if case.rows == rows and case.top1_agreed < agreed:
        found.append(f"{case.top1_agreed} of {rows} best tokens agree, {agreed} in the baseline")
    for kind in case.kinds:
        before = kept["max_abs"].get(kind.kind)
        if before is None:
            continue
        allowed = max(FACTOR * before, FLOOR * kind.bound)
        if not kind.max_abs <= allowed:
            found.append(f"{kind.kind} are off by {kind.max_abs:.3g}, {before:.3g} in the baseline (a drift from "
                         f"{allowed:.3g} on)")
    return found


def _sound(bundles: Any) -> bool:
    """Whether a file's bundles have the form that `judge` relies on."""
    try:
        for entry in bundles.values():
            loss = entry.get("loss")
            if loss is not None and not (isinstance(loss["text_sha256"], str) and all(
                    isinstance(loss[name], float | int) and math.isfinite(loss[name])
                    for name in ("kl_mean", "perplexity_increase"))):
                return False
            for case in entry["cases"].values():
                agreed, rows = (int(number) for number in case["best_tokens"].split("/"))
                numbers = list(case["max_abs"].values())
                if not 0 <= agreed <= rows or not all(isinstance(x, float | int) and math.isfinite(x) for x in numbers):
                    return False
        return True
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
