"""Compares bundles of one checkpoint with one another: the first is the reference of the others. No PyTorch is needed.

What is lost without the checkpoint: there is no same-dtype baseline, so the tolerance is the assumed one, and an error
that all bundles share cannot show.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..bundle.attention_claims import check_claims
from ..bundle.integrity import check_files
from ..bundle.manifest import Manifest, read_manifest
from ..compare.judge import judge
from ..compare.suite import STEPS, plan_suite
from ..compare.tolerance import EPSILON
from ..compare.verdict import Verdict
from ..environment.versions import versions
from ..errors import GqaExportError, InvalidBundle
from ..graph_io import HIDDEN_STATES
from ..progress import Progress, silent
from ..runtime.session import Session
from .parts import exact_session, rounds_for_good
from .reference import runnable
from .refusals import judge_refusals
from .run_cases import run_cases
from .sessions import FillGarbage, Sessions, choose_bundle_provider, load_engine
from .suite_setting import setting_of
from .untrusted import logits_of_last_token, nan_tail_safe, takes_whole_row_masks


@dataclass(frozen=True)
class _Opened:
    folder: Path
    manifest: Manifest
    ran_dtype: str
    provider: str
    session: Session
    fill_garbage: FillGarbage | None
    nan_tail_safe: bool
    whole_row_masks: bool = False


def cross_check(bundles: Sequence[Path], *, level: str = "quick", steps: int = 0, provider: str = "auto",
                as_dtype: str | None = None, progress: Progress | None = None) -> list[Verdict]:
    """Compare every bundle but the first with the first, case by case.

    Args:
        bundles: folders, two or more; the first is the reference.
        level, steps, provider, as_dtype, progress: as of `gqa_export.validation.validate.validate`.

    Returns:
        One verdict for each bundle but the first.

    Raises:
        InvalidBundle: a bundle is damaged, or the bundles belong to different models; layer and fact are named.
        GqaExportError: one is an engine that rounds the inputs of products.
        NotCheckedHere: this machine cannot run one of them.
    """
    report = progress or silent
    manifests = [read_manifest(folder) for folder in bundles]
    for folder, manifest in zip(bundles, manifests):
        check_files(folder, manifest)
        if manifest.engine is None:
            check_claims(folder, manifest)
        refuse_rounding(folder, manifest)
    for folder, manifest in zip(bundles[1:], manifests[1:]):
        _same_model(manifests[0], manifest, f"{bundles[0]} and {folder}")
    with ExitStack() as stack:
        notes = list[str]()
        opened = [_open(stack, folder, manifest, provider, as_dtype, notes, report)
                  for folder, manifest in zip(bundles, manifests)]
        return [_compare(opened[0], other, level, steps, notes, report) for other in opened[1:]]


def refuse_rounding(folder: Path, manifest: Manifest) -> None:
    """Refuse an engine whose products round their inputs: of a graph that is left out here, of an engine it cannot be.

    Raises:
        GqaExportError: it is one.
    """
    if rounds_for_good(manifest):
        raise GqaExportError("bundles are compared with one another without the rounding of inputs, and that of an "
                             "engine cannot be left out", str(folder), "compare it with the checkpoint: gqa-export "
                             f"validate {folder} --against CHECKPOINT", code="E-VALIDATE-ROUNDED")


def _compare(first: _Opened, other: _Opened, level: str, steps: int, notes: list[str], report: Progress) -> Verdict:
    began = time.perf_counter()
    smaller = min(first.manifest.capacity, other.manifest.capacity)
    setting = setting_of(replace(other.manifest, capacity=smaller), other.folder, steps or STEPS.get(level, 32))
    setting.nan_tail_safe, setting.whole_row_masks = other.nan_tail_safe, other.whole_row_masks
    setting.literal = setting.literal or setting_of(first.manifest, first.folder, 1).literal
    plan = plan_suite(setting, level)
    windows = tuple(one.manifest.window_cache for one in (first, other) if one.manifest.window_cache)
    gives = [any(fact.name == HIDDEN_STATES for fact in one.manifest.outputs) for one in (first, other)]
    if any(gives) and not all(gives):
        notes.append("hidden states were not compared: one of the bundles does not give them")
    logs = run_cases(Sessions(first.session, None, other.session, other.fill_garbage, windows=windows,
                              hidden=all(gives)), plan,
                     last_only=any(logits_of_last_token(one.manifest, str(one.folder)) for one in (first, other)),
                     report=report)
    dtype = max(first.ran_dtype, other.ran_dtype, key=EPSILON.__getitem__)
    refused = judge_refusals(other.session, resizable=not setting.literal)
    return Verdict(
        bundle=str(other.folder), against=str(first.folder), target=other.manifest.target, dtype=other.manifest.dtype,
        checked_dtype=dtype, reference_dtype=first.ran_dtype, provider=other.provider, cache=other.manifest.cache,
        capacity=smaller, cases=(*(judge(log, dtype) for log in logs), refused), level=level,
        notes=(*plan.notes, *notes, "bundle against bundle: the tolerance is assumed, not measured"),
        versions=versions(), seconds=time.perf_counter() - began)


def _open(stack: ExitStack, folder: Path, manifest: Manifest, provider: str, as_dtype: str | None, notes: list[str],
          report: Progress) -> _Opened:
    from ..targets import get_target

    built, target = manifest.engine, get_target(manifest.target)
    report(f"loading {folder.name}", None, None)
    if built:
        return _Opened(folder, manifest, manifest.dtype, built.flavor, *load_engine(folder, provider, as_dtype),
                       nan_tail_safe=target.nan_tail_safe)
    ran_dtype = "float32" if as_dtype or target.engine else manifest.dtype
    provider = choose_bundle_provider(manifest, provider, ran_dtype)
    ran, where, target = runnable(stack, folder, manifest, ran_dtype, notes, report)
    session, fill_garbage = exact_session(stack, where, ran, provider, notes, target)
    return _Opened(folder, manifest, ran_dtype, provider, session, fill_garbage,
                   target.nan_tail_safe or nan_tail_safe(where),
                   target.whole_row_masks or takes_whole_row_masks(where))


def _same_model(first: Manifest, other: Manifest, where: str) -> None:
    """Refuse bundles of different models, naming the first fact that tells."""
    fix = "pass bundles that were exported from one checkpoint"
    for name in ("model_type", "vocabulary", "hidden_size"):
        one, two = getattr(first.spec, name), getattr(other.spec, name)
        if one != two:
            raise InvalidBundle(f"the bundles belong to different models: {name} is {one} and {two}", where, fix,
                                code="E-VALIDATE-MODELS")
    if len(first.spec.layers) != len(other.spec.layers):
        raise InvalidBundle(f"the bundles belong to different models: {len(first.spec.layers)} and "
                            f"{len(other.spec.layers)} layers", where, fix, code="E-VALIDATE-MODELS")
    for a, b in zip(first.spec.layers, other.spec.layers):
        for name, value in asdict(a).items():
            if value != getattr(b, name):
                raise InvalidBundle(f"the bundles disagree on layer {a.layer}: {name} is {value} and "
                                    f"{getattr(b, name)}", where, "export both again: one of them is wrong",
                                    code="E-VALIDATE-LAYERS")
