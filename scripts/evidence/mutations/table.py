"""The proof of the suite: every kind of damage done to good bundles, and which case caught it at which level.

One row per kind. A kind is tried on the first bundle that has what it breaks; the reference is computed once per
checkpoint and replayed. `docs/trust.md` shows the table, `docs/benchmarks/mutations.json` holds it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from evidence.mutations.contradictions import CONTRADICTIONS, Contradiction, contradict
from evidence.mutations.kinds import MUTATIONS
from evidence.mutations.mutation import Mutation, NotHere, break_bundle
from gqa_export.bundle.manifest import read_manifest
from gqa_export.compare.suite import LEVELS, SUITE
from gqa_export.errors import GqaExportError
from gqa_export.validation.loss import LossRequest
from gqa_export.validation.reference import Reference, open_reference
from gqa_export.validation.validate import validate

STEPS = 8
"""decode steps of each case: the ragged one then has its uneven ones"""


@dataclass(frozen=True)
class Sample:
    """A good bundle and its checkpoint, opened once. name: what the table calls it. reference: None: the checkpoint is
    opened whenever it is needed. text: the calibration text, of a bundle whose scales it gave."""

    name: str
    bundle: Path
    checkpoint: Path
    reference: Reference | None
    text: Path | None = None


@dataclass(frozen=True)
class Row:
    """A kind of damage. caught: per level, the names of the cases that failed, or what refused it; () is a miss."""

    kind: str
    breaks: str
    sample: str
    caught: dict[str, tuple[str, ...]]


def open_sample(name: str, bundle: Path, checkpoint: Path, text: Path | None = None) -> Sample:
    """Load a bundle's checkpoint; PyTorch's answers are kept."""
    from evidence.mutations.replayed_session import ReplayedSession

    manifest = read_manifest(bundle)
    known = open_reference(checkpoint, manifest, manifest.dtype, [], text, bundle)
    if manifest.kv_cache is None:  # else what PyTorch answers depends on the codes that it follows
        known = replace(known, session=ReplayedSession(known.session),
                        eager=None if known.eager is None else ReplayedSession(known.eager))
    return Sample(name, bundle, checkpoint, known, text)


def judge_damage(sample: Sample, broken: Path, level: str = "full") -> dict[str, tuple[str, ...]]:
    """What catches a broken bundle at each level up to `level`: names of the failed cases, or the refusal.

    A level's cases are the first of the next one's, prompts included, so one run tells of all.
    """
    levels = LEVELS[: LEVELS.index(level) + 1]
    try:
        verdict = validate(broken, sample.checkpoint, level=level, steps=STEPS, reference=sample.reference)
    except GqaExportError as error:
        return dict.fromkeys(levels, (f"refused: {error.what.splitlines()[0]}",))
    ranks = {entry.name: LEVELS.index(entry.level) for entry in SUITE}
    failed = [case for case in verdict.cases if not case.passed]
    return {name: tuple(case.name for case in failed if ranks[case.entry] <= rank)
            for rank, name in enumerate(levels)}


def judge_quick_first(sample: Sample, broken: Path) -> dict[str, tuple[str, ...]]:
    """Like `judge_damage`, but `full` is run only where `quick` caught nothing: it contains the cases of `quick`."""
    caught = judge_damage(sample, broken, "quick")
    return {**caught, "full": caught["quick"]} if caught["quick"] else judge_damage(sample, broken)


def mutation_row(mutation: Mutation, samples: Sequence[Sample], work: Path,
                 judge: Callable[[Sample, Path], dict[str, tuple[str, ...]]] = judge_damage) -> Row | None:
    """Try one kind on the first sample that has what it breaks, at every level; None if none has."""
    for sample in samples:
        folder = work / mutation.name.replace(" ", "_").replace(",", "")
        try:
            break_bundle(sample.bundle, folder, mutation.change)
        except NotHere:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        caught = judge(sample, folder)
        shutil.rmtree(folder)
        return Row(mutation.name, mutation.breaks, sample.name, caught)
    return None


def needed(samples: Sequence[Sample], kinds: Iterable[Mutation | Contradiction], work: Path) -> list[Sample]:
    """Those of the samples on which these kinds are tried, in their order."""
    found = set()
    for kind in kinds:
        for sample in samples:
            folder = work / "whether"
            try:
                if isinstance(kind, Contradiction):
                    contradict(sample.bundle, folder, kind)
                else:
                    break_bundle(sample.bundle, folder, kind.change)
            except NotHere:
                continue
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            found.add(sample.name)
            break
    return [sample for sample in samples if sample.name in found]


def contradiction_rows(samples: Sequence[Sample], work: Path,
                       kinds: Iterable[Contradiction] = CONTRADICTIONS) -> Iterator[Row]:
    """Every kind of bundle that contradicts its manifest, of the first sample that has what it breaks. A refusal counts
    if it has the code and names the facts."""
    for one in kinds:
        for sample in samples:
            folder = work / "contradiction"
            try:
                contradict(sample.bundle, folder, one)
            except NotHere:
                continue
            else:
                yield Row(one.name, one.breaks, sample.name, dict.fromkeys(LEVELS, _refusal(one, sample, folder, work)))
                break
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def _refusal(one: Contradiction, sample: Sample, folder: Path, work: Path) -> tuple[str, ...]:
    """What refuses a bundle that contradicts its manifest; () if nothing does, or something else than is expected."""
    try:
        validate(folder, sample.checkpoint, steps=STEPS, reference=None if one.opens or one.text else sample.reference,
                 loss=LossRequest(calibrate=sample.text if one.text else None))
        code = message = ""
    except GqaExportError as error:
        code, message = error.code, str(error).replace(str(work) + "/", "")
    named = code == one.code and all(fact in message for fact in one.facts)
    return (f"refused: {message.splitlines()[0]}",) if named else ()


def prove(samples: Sequence[Sample], work: Path, tell: Callable[[Row], None] = lambda row: None,
          kinds: Iterable[Mutation] = MUTATIONS, *, quick_first: bool = False) -> list[Row]:
    """All rows, mutations first. Good bundles are judged before: a sample that does not pass proves nothing.

    quick_first: see `judge_quick_first`; for real models, of which `full` takes minutes.
    """
    for sample in samples:
        failed = judge_damage(sample, sample.bundle)["full"]
        if failed:
            raise GqaExportError(f"the undamaged bundle {sample.name} fails: {', '.join(failed)}",
                                 str(sample.bundle), "prove the suite on a bundle that passes",
                                 code="E-VALIDATE-SAMPLE")
    rows = []
    for mutation in kinds:
        row = mutation_row(mutation, samples, work, judge_quick_first if quick_first else judge_damage)
        if row is not None:
            rows.append(row)
            tell(row)
    return rows


def shares(rows: Sequence[Row]) -> dict[str, float]:
    """Per level, the share of rows that something caught."""
    return {level: sum(bool(row.caught[level]) for row in rows) / len(rows) for level in LEVELS}


def to_dict(rows: Sequence[Row], samples: Sequence[str]) -> dict[str, Any]:
    """Plain data for JSON."""
    return {"samples": list(samples), "steps": STEPS, "share": shares(rows), "rows": [asdict(row) for row in rows]}


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| kind | as if | on | quick | full adds |", "|---|---|---|---|---|"]
    for row in rows:
        quick, full = row.caught["quick"], row.caught["full"]
        added = tuple(name for name in full if name not in quick)
        lines.append(f"| {row.kind} | {row.breaks} | {row.sample} | {_names(quick)} | {_names(added)} |")
    return "\n".join(lines)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "-"
