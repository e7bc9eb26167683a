"""Compares a bundle with PyTorch: opens both, runs the cases through Polygraphy's Comparator, judges.

Three runners walk in step: PyTorch in fp64 (the truth), PyTorch in the bundle's number format (the yardstick of
`compare.tolerance`), and the bundle. Composes `run` and `compare`; holds no comparison of its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .suite_setting import asked_of
from ..bundle.manifest import MANIFEST, MODEL, Manifest, read_manifest
from ..bundle.integrity import check_belongs, check_files
from ..compare.suite import STEPS, plan_battery
from ..compare.cases import Case, Plan
from ..compare.case_driver import BUNDLE, EAGER, TRUTH, CaseDriver, CaseLog
from ..compare.judge import doubtful, judge
from .refusals import judge_refusals
from ..compare.verdict import Verdict
from ..errors import GqaExportError
from ..bundle.attention_claims import check_claims
from ..runtime.session import Session
from .sessions import (
    Sides,
    bundle_session,
    choose_bundle_provider,
    is_large,
    load_engine,
    pytorch_sessions,
    torch_threads,
    what_it_shows,
)

if TYPE_CHECKING:
    from ..targets import Target

Report = Callable[[str, float | None, float | None], None]
"""what is being done, how much is done, of how much"""
REDRAWS = (1, 2, 3)
"""seeds: a case that fails narrowly is held against the largest of four draws of PyTorch's rounding errors"""


@dataclass(frozen=True)
class Reference:
    """A checkpoint opened for comparison: the truth, the yardstick, the truth's number format, its model, and what it
    shows of itself."""

    truth: Session
    eager: Session | None
    truth_dtype: str
    model: Any
    shown: dict[str, object]


def validate(bundle: Path | str, against: str | Path, *, level: str = "quick", steps: int = 0,
             text: Path | None = None, provider: str = "auto", as_dtype: str | None = None, full_hash: bool = False,
             check_hashes: bool = True, progress: Report | None = None, reference: Reference | None = None) -> Verdict:
    """Compare a bundle with the checkpoint it was made from.

    level, steps: which cases of `compare.battery`, and how many decode steps each (0: the level's own). text: a file
    whose perplexity is measured too, with the bundle's tokenizer. as_dtype "fp32": check the fp32 twin of a bf16 or
    fp16 bundle (of an engine's ONNX that is done always, plugin nodes interpreted). full_hash: sha256 of every file
    whatever its size; check_hashes False: only sizes (right after an export). reference: the checkpoint, already
    opened. Raises GqaExportError for a bundle that
    is damaged or belongs to another checkpoint, NotCheckedHere where this machine cannot run it.
    """
    from ..targets import get_target

    if as_dtype not in (None, "fp32"):
        raise GqaExportError(f"--as {as_dtype} is not offered", "--as", "use --as fp32")
    began, folder, report = time.perf_counter(), Path(bundle), progress or (lambda *_: None)
    report("checking the bundle's files", None, None)
    manifest = read_manifest(folder)
    unhashed = check_files(folder, manifest, full=full_hash, hashes=check_hashes)
    if manifest.engine is None:
        check_claims(folder, manifest)
    target, built, notes = get_target(manifest.target), manifest.engine, list[str]()
    engine = load_engine(folder, provider, as_dtype) if built else None
    ran_dtype = "float32" if as_dtype or (target.engine and not built) else manifest.dtype
    provider = built.flavor if built else choose_bundle_provider(manifest, provider, ran_dtype)
    report("loading the checkpoint", None, None)
    with ExitStack() as stack:
        stack.enter_context(torch_threads(manifest))
        ran, where, target = runnable(stack, folder, manifest, ran_dtype, notes, report)
        known = reference or open_reference(against, manifest, ran_dtype, notes)
        check_belongs(manifest.spec, known.shown, f"{folder} against {against}")
        report("loading the bundle", None, None)
        session, poison = engine or stack.enter_context(bundle_session(where, ran, provider, notes, target))
        setting = asked_of(manifest, folder, steps or STEPS.get(level, 32), text, known.model)
        setting.nan_tail_safe = target.nan_tail_safe
        plan = plan_battery(setting, level)
        sides = Sides(known.truth, known.eager, session, poison, beside=not built and is_large(manifest))
        logs = run_cases(sides, plan, last_only=manifest.logits == "last", report=report, dtype=ran_dtype, notes=notes)
        refused = judge_refusals(session, resizable=not setting.literal)
    if check_hashes and unhashed:
        notes.append(f"sha256 not computed of {', '.join(unhashed)} (--hash computes all)")
    return Verdict(
        bundle=str(folder), against=str(against), target=manifest.target, dtype=manifest.dtype,
        checked_dtype=ran_dtype, truth_dtype=known.truth_dtype, provider=provider, cache=manifest.cache,
        capacity=manifest.capacity, cases=(*(judge(log, ran_dtype) for log in logs), refused), level=level,
        notes=(*plan.notes, *notes), versions=versions(), seconds=time.perf_counter() - began)


def runnable(stack: ExitStack, folder: Path, manifest: Manifest, ran_dtype: str, notes: list[str],
             report: Report) -> tuple[Manifest, Path, Target]:
    """What is run for a bundle, while `stack` is open: the bundle itself, its fp32 twin where another format is
    asked for, and of an engine's graph, as long as no engine was built, a form that ONNX Runtime can run."""
    from ..targets import get_target, on_cpu

    ran, where, target = manifest, folder, get_target(manifest.target)
    if ran_dtype != manifest.dtype:
        report("widening to fp32", None, None)
        ran, where = stack.enter_context(_twin(folder))
    if target.engine and manifest.engine is None:
        ran, where = stack.enter_context(_interpreted(where, ran, notes))
        target = on_cpu(target)
    return ran, where, target


def open_reference(against: str | Path, manifest: Manifest, ran_dtype: str, notes: list[str]) -> Reference:
    """Open a checkpoint for bundles like this one, run in this number format."""
    from ..bundle.source_checkpoint import open_for

    truth, eager, truth_dtype = pytorch_sessions(open_for(manifest, against), manifest, ran_dtype, notes)
    return Reference(truth, eager, truth_dtype, truth.model, what_it_shows(truth, str(against)))


def run_cases(sides: Sides, plan: Plan, *, last_only: bool = False, report: Report | None = None,
              dtype: str = "float32", notes: list[str] | None = None) -> list[CaseLog]:
    """Run every case of a plan through the Comparator and return what was measured. dtype: the format that is run;
    notes: where is said whose yardstick was measured again."""
    total, done = sum(case.feeds for case in plan.cases), 0
    logs = []
    for case in plan.cases:
        def tick(name: str = case.name) -> None:
            nonlocal done
            done += 1
            if report is not None:
                report(f"comparing: {name}", done, total)

        if case.poison and sides.poison is None:
            continue
        if sides.poison is not None:
            sides.poison(case.poison)
        with limited(sides, case.capacity):
            log = run_case(sides, case, last_only, tick)
            if sides.eager is not None and doubtful(judge(log, dtype)):
                measure_again(sides, log, last_only)
                (notes if notes is not None else []).append(
                    f"case {case.name}: nearer to its bounds than one measurement of PyTorch's rounding can tell; "
                    f"measured {1 + len(REDRAWS)} times")
            logs.append(log)
    return logs


def measure_again(sides: Sides, log: CaseLog, last_only: bool) -> None:
    """Let the yardsticks of a case be the largest of several draws of PyTorch's rounding errors."""
    eager: Any = sides.eager
    for seed in REDRAWS:
        with eager.redrawn(seed):
            drawn = run_case(sides, log.case, last_only, lambda: None).yardstick or {}
        log.yardstick = {name: max(known, drawn.get(name, 0.0)) for name, known in (log.yardstick or {}).items()}


@contextmanager
def limited(sides: Sides, capacity: int) -> Iterator[None]:
    """Inside, no cache of any side holds more than `capacity` tokens (0: as they are)."""
    sessions: list[Any] = [side for side in (sides.truth, sides.eager, sides.bundle) if side is not None]
    before = [session.capacity for session in sessions]
    try:
        for session in sessions if capacity else ():
            session.capacity = capacity
        yield
    finally:
        for session, whole in zip(sessions, before):
            session.capacity = whole


def run_case(sides: Sides, case: Case, last_only: bool, tick: Callable[[], None]) -> CaseLog:
    """Run one case. Polygraphy streams: a step's arrays are dropped before the next one runs."""
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    from .session_runner import SessionRunner

    began = time.perf_counter()
    others = [SessionRunner(sides.bundle, BUNDLE, last_only=last_only, single=case.single)]
    if sides.eager is not None:
        others.insert(0, SessionRunner(sides.eager, EAGER, free=False, last_only=last_only))
    pairs = [(0, 1)] if len(others) == 1 else [(0, 1), (1, 2), (0, 2)]
    runners = [SessionRunner(sides.truth, TRUTH, last_only=last_only, beside=others if sides.beside else ()), *others]
    driver = CaseDriver(case, np.concatenate(case.prompts), tick)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        stream = Comparator.run(runners, data_loader=driver.feeds(), streaming=True)
        Comparator.compare_accuracy(stream, comparisons=pairs, compare_func=driver.compare)
    driver.log.seconds = time.perf_counter() - began
    return driver.log


@contextmanager
def _twin(folder: Path) -> Iterator[tuple[Manifest, Path]]:
    from .fp32_twin import write_twin

    with tempfile.TemporaryDirectory(prefix="gqa-export-twin-") as place:
        yield write_twin(folder, Path(place)), Path(place)


@contextmanager
def _interpreted(folder: Path, manifest: Manifest, notes: list[str]) -> Iterator[tuple[Manifest, Path]]:
    """A folder with the bundle's graph as ONNX Runtime can run it, its weights linked (copied where that fails)."""
    import onnx

    from ..lowering.tensorrt.interpret import interpret

    model = onnx.load(str(folder / MODEL), load_external_data=False)
    count = interpret(model)
    how = f"{count} plugin nodes interpreted by the op's function body" if count else "as it is"
    notes.append(f"the ONNX graph was run in fp32 by ONNX Runtime, {how}: no TensorRT engine was built or run")
    with tempfile.TemporaryDirectory(prefix="gqa-export-interpreted-") as place:
        for name in set(manifest.files) - {MODEL}:
            source, copy = (folder / name).resolve(), Path(place) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, copy)
            except OSError:
                shutil.copyfile(source, copy)
        onnx.save(model, str(Path(place) / MODEL))
        stand_in = replace(manifest, files={name: fact for name, fact in manifest.files.items() if name != MODEL})
        (Path(place) / MANIFEST).write_text(stand_in.to_json(), encoding="utf-8")
        yield stand_in, Path(place)


def versions() -> dict[str, str]:
    """Of the packages that a comparison rests on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("gqa-export", "torch", "transformers", "onnxruntime", "onnxruntime-gpu", "polygraphy", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

