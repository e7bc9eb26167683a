"""Compares a bundle with PyTorch: opens both, runs the cases through Polygraphy's Comparator, judges.

Three runners walk in step: PyTorch in fp64 (the reference), PyTorch in the bundle's number format (the same-dtype
baseline of `compare.tolerance`), and the bundle.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..bundle.attention_claims import check_claims
from ..bundle.integrity import check_belongs, check_files
from ..bundle.manifest import Manifest, read_manifest
from ..checkpoint.checkpoint import Checkpoint
from ..compare.suite import STEPS, plan_suite
from ..compare.verdict import Verdict
from ..environment.heap import reused_memory
from ..environment.versions import versions
from ..errors import GqaExportError, NotCheckedHere
from ..progress import Progress, silent
from ..targets import get_target
from .accuracy_level import rounds_activations
from .in_place import judge_in_place
from .long_cases import judge_long
from .long_graph import long_graph_as_run
from .long_loss import LongRequest, measure_long_loss, sequences_of
from .loss import LossRequest, measure_loss
from .parts import EXACT, Comparison, activations_of, exact_session, rounds_for_good
from .ranks import held_here
from .reference import Reference, open_reference, runnable, with_ranks
from .refusals import judge_refusals
from .sessions import bundle_session, choose_bundle_provider, load_engine, torch_threads, use_adapter
from .suite_setting import check_tokenizer, setting_of
from .untrusted import logits_of_last_token, nan_tail_safe, takes_whole_row_masks

NO_LOSS, NO_LONG = LossRequest(), LongRequest()


def validate(bundle: Path | str, against: str | Path | Checkpoint, *, level: str = "quick", steps: int = 0,
             text: Path | None = None, provider: str = "auto", as_dtype: str | None = None, full_hash: bool = False,
             check_hashes: bool = True, progress: Progress | None = None,
             reference: Reference | None = None, loss: LossRequest = NO_LOSS,
             long: LongRequest = NO_LONG) -> Verdict:
    """Compare a bundle with the checkpoint it was made from.

    Args:
        bundle: its folder.
        against: checkpoint folder, hub id, .gguf file, or a checkpoint that is open.
        level: "quick" or "full", which cases of `gqa_export.compare.suite` are run.
        steps: decode steps of each case; 0 is the level's own number.
        text: a UTF-8 file whose perplexity is measured too, with the bundle's tokenizer.
        provider: "cpu", "cuda" or "auto", where ONNX Runtime runs the bundle.
        as_dtype: "fp32" checks the fp32 twin of a bf16 or fp16 bundle; an engine's graph always runs in fp32, its
            plugin nodes interpreted.
        full_hash: compute sha256 of every file, whatever its size.
        check_hashes: False checks sizes only (right after an export).
        progress: called with what is done, how much, of how much.
        reference: the checkpoint `against`, already opened by `open_reference`.
        loss: which checkpoint the loss is measured against, on which text, and how much it may be.
        long: on which text what approximate attention costs is measured, and how much that may be.

    Returns:
        The verdict, passed or not; a difference does not raise (`Verdict.check` does).

    Raises:
        InvalidBundle: the bundle is damaged, or belongs to another checkpoint.
        InvalidCheckpoint: the checkpoint cannot be read, or its own logits are NaN.
        NotCheckedHere: this machine cannot run the bundle, or has no memory for PyTorch.
        GqaExportError: an option does not fit the bundle.
    """
    if as_dtype not in (None, "fp32"):
        raise GqaExportError(f"--as accepts fp32 only, got {as_dtype!r}", "--as", "use --as fp32", code="E-OPTION-AS")
    loss.check()
    began, folder, report = time.perf_counter(), Path(bundle), progress or silent
    report("checking the bundle's files", None, None)
    manifest = read_manifest(folder)
    unhashed = check_files(folder, manifest, full=full_hash, hashes=check_hashes)
    check_tokenizer(folder)
    long.check(manifest, str(folder))
    prompts, long_missing = sequences_of(long, manifest, folder)
    if manifest.engine is None:
        check_claims(folder, manifest)
    target, built, notes = get_target(manifest.target), manifest.engine, list[str]()
    engine = load_engine(folder, provider, as_dtype) if built else None
    last_only = logits_of_last_token(manifest, str(folder))
    ran_dtype = "float32" if as_dtype or (target.engine and not built) else manifest.dtype
    provider = built.flavor if built else choose_bundle_provider(manifest, provider, ran_dtype)
    report("loading the checkpoint", None, None)
    with ExitStack() as stack:
        stack.enter_context(reused_memory())
        stack.enter_context(torch_threads(manifest))
        ran, where, target = runnable(stack, folder, manifest, ran_dtype, notes, report)
        rounds = provider == "cpu" and not built and rounds_activations(where, ran)
        fixed = rounds_for_good(manifest)
        known = reference or open_reference(against, manifest, ran_dtype, notes, loss.calibrate, folder)
        if fixed and known.eager is None:
            raise NotCheckedHere("an engine cannot leave the rounding of inputs out, and memory does not hold PyTorch "
                                 "in the engine's number format beside the reference, which alone rounds as it does",
                                 str(folder), "validate on a machine with more memory", code="E-VALIDATE-MEMORY")
        check_belongs(manifest.spec, known.shown, f"{folder} against {against}")
        report("loading the bundle", None, None)
        setting = setting_of(manifest, folder, steps or STEPS.get(level, 32), text, known.model)
        if manifest.long is not None and built:
            leaf = manifest.long.plan.setting.leaf
            setting.capacity = min(setting.capacity, leaf)
            notes.append(f"no case is longer than the leaf of {leaf} tokens, up to which the engine is exact: beyond, "
                         "what it reads is a choice of its own that an engine does not show. The graph that it was "
                         "built from is compared with the choice handed over: validate that bundle")
        setting.nan_tail_safe = target.nan_tail_safe or (not built and nan_tail_safe(where))
        setting.whole_row_masks = target.whole_row_masks or (not built and takes_whole_row_masks(where))
        plan = plan_suite(setting, level)
        if (held := held_here(manifest)) is not None:
            known = with_ranks(known, held)
        comparison = Comparison(known, plan, ran, last_only, ran_dtype, notes, report, manifest.kv_cache is not None)
        handles: list[Any] = []  # of ONNX Runtime's sessions
        with ExitStack() as opened:
            session, fill_garbage = engine or exact_session(opened, where, ran, provider, notes, target, handles)
            use_adapter(session, manifest, against, as_dtype)
            if fixed:  # what an engine rounds cannot be left out
                cases, overflow = comparison.shipped(session, fill_garbage, alone=True)
            else:
                cases, overflow = comparison.exact(session, fill_garbage, EXACT if rounds else "")
            cases += judge_in_place(session, where, provider, target, handles, ran_dtype, EXACT if rounds else "")
            handles.clear()
            if not rounds:
                cases += (judge_refusals(session, resizable=not setting.literal),)
                measured = measure_loss(loss, session, manifest, folder, known, notes, report)
        if rounds:
            session, fill_garbage = stack.enter_context(bundle_session(where, ran, provider, notes, target))
            use_adapter(session, manifest, against, as_dtype)
            cases += comparison.shipped(session, fill_garbage)[0]
            cases += (judge_refusals(session, resizable=not setting.literal),)
            measured = measure_loss(loss, session, manifest, folder, known, notes, report)
        if manifest.long is not None and not built:
            place, shown = stack.enter_context(long_graph_as_run(folder, manifest, ran_dtype))
            judged = list(judge_long(place, shown, provider, known, ran_dtype, level, report))
            cases, notes = (*cases, *(case for case, _ in judged)), [*notes, *(line for _, line in judged)]
        quality = measure_long_loss(long, prompts, manifest, known, ran_dtype, report)
    if check_hashes:
        notes += _hash_notes(manifest, unhashed)
    return Verdict(
        bundle=str(folder), against=str(against), target=manifest.target, dtype=manifest.dtype,
        checked_dtype=ran_dtype, reference_dtype=known.dtype, provider=provider, cache=manifest.cache,
        capacity=manifest.capacity, cases=cases, level=level,
        notes=(*plan.notes, *notes), versions=versions(), seconds=time.perf_counter() - began,
        identity=identity_of(manifest, known.digest), overflow=overflow, loss=measured,
        activations=activations_of(manifest, rounds or fixed), long=quality, long_missing=long_missing,
        approximated="" if manifest.long is None else manifest.long.plan.setting.method)


def _hash_notes(manifest: Manifest, unhashed: list[str]) -> list[str]:
    """What the sha256 of the bundle's files did not show, and how it could."""
    unknown = [name for name in unhashed if not manifest.files[name].sha256]
    skipped = [name for name in unhashed if name not in unknown]
    notes = [f"sha256 not computed of {', '.join(skipped)} (--hash computes all)"] if skipped else []
    if unknown:
        notes.append(f"the manifest has no sha256 of {', '.join(unknown)}: header, size and time of modification were "
                     "compared (an export with --hash records the sha256 of files that are used where they are)")
    return notes


def identity_of(manifest: Manifest, digest: str) -> str:
    """See `Verdict.identity`. digest: of the checkpoint."""
    chosen = [digest, manifest.logits, manifest.weights, manifest.source.get("text_only", False)]
    return hashlib.sha256(json.dumps(chosen, default=str).encode()).hexdigest()
