"""Compares a bundle with PyTorch: opens both, runs the cases through Polygraphy's Comparator, judges.

Three runners walk in step: PyTorch in fp64 (the truth), PyTorch in the bundle's number format (the yardstick of
`compare.tolerance`), and the bundle. Composes `run` and `compare`; holds no comparison of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import MODEL, Manifest, read_manifest
from .bundle_check import check_belongs, check_files
from .compare.cases import Case, Plan, plan_cases
from .compare.drive import BUNDLE, EAGER, TRUTH, CaseDriver, CaseLog
from .compare.verdict import Verdict, judge
from .errors import GqaExportError, NotCheckedHere
from .run.session import Session

Report = Callable[[str, float | None, float | None], None]
"""what is being done, how much is done, of how much"""

TEXT = ("The water of a river that reaches the sea has travelled for weeks. Most of it fell as rain, some as snow, "
        "and a little of it has been here before.")


@dataclass
class Sides:
    """The sessions that are compared. eager None: there was no room for it. poison: sets what lies in the cache's
    tail, where the bundle's session can be reached that way."""

    truth: Session
    eager: Session | None
    bundle: Session
    poison: Callable[[float], None] | None = None


def validate(bundle: Path | str, against: str | Path, *, steps: int = 32, provider: str = "auto",
             as_dtype: str | None = None, full_hash: bool = False, check_hashes: bool = True,
             progress: Report | None = None) -> Verdict:
    """Compare a bundle with the checkpoint it was made from.

    as_dtype "fp32": check the fp32 twin of a bf16 or fp16 bundle. full_hash: sha256 of every file whatever its
    size; check_hashes False: only sizes (right after an export). Raises GqaExportError for a bundle that is damaged
    or belongs to another checkpoint, NotCheckedHere where this machine cannot run it.
    """
    began, folder, report = time.perf_counter(), Path(bundle), progress or (lambda *_: None)
    report("checking the bundle's files", None, None)
    manifest = read_manifest(folder)
    unhashed = check_files(folder, manifest, full=full_hash, hashes=check_hashes)
    provider = choose_provider(manifest, provider, as_dtype)
    with ExitStack() as stack:
        ran, where = manifest, folder
        if as_dtype is not None and as_dtype != manifest.dtype:
            report(f"widening to {as_dtype}", None, None)
            ran, where = stack.enter_context(_twin(folder, as_dtype))
        report("loading the checkpoint", None, None)
        checkpoint, truth, eager, notes = _pytorch(against, manifest, ran)
        check_belongs(manifest.spec, _shown(truth), f"{folder} against {against}")
        report("loading the bundle", None, None)
        session, poison = stack.enter_context(_bundle_session(where, ran, provider))
        plan = plan_cases(manifest.spec, manifest.capacity, steps=steps, special=_special(manifest),
                          original_positions=_original_positions(truth), text_ids=_text_ids(checkpoint, folder))
        logs = run_cases(Sides(truth, eager, session, poison), plan, last_only=manifest.logits == "last",
                         report=report)
    if check_hashes and unhashed:
        notes.append(f"sha256 not computed of {', '.join(unhashed)} (--hash computes all)")
    return Verdict(
        bundle=str(folder), against=str(against), target=manifest.target, dtype=manifest.dtype,
        checked_dtype=ran.dtype, truth_dtype="fp64", provider=provider, cache=manifest.cache,
        capacity=manifest.capacity, cases=tuple(judge(log, ran.dtype) for log in logs),
        notes=(*plan.notes, *notes), versions=_versions(), seconds=time.perf_counter() - began)


def run_cases(sides: Sides, plan: Plan, *, last_only: bool = False, report: Report | None = None) -> list[CaseLog]:
    """Run every case of a plan through the Comparator and return what was measured."""
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
        logs.append(run_case(sides, case, last_only, tick))
    return logs


def run_case(sides: Sides, case: Case, last_only: bool, tick: Callable[[], None]) -> CaseLog:
    """Run one case. Polygraphy streams: a step's arrays are dropped before the next one runs."""
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    from .run.polygraphy_runner import SessionRunner

    began = time.perf_counter()
    runners = [SessionRunner(sides.truth, TRUTH, last_only=last_only)]
    pairs = [(0, 1)]
    if sides.eager is not None:
        runners.append(SessionRunner(sides.eager, EAGER, free=False, last_only=last_only))
        pairs = [(0, 1), (1, 2), (0, 2)]
    runners.append(SessionRunner(sides.bundle, BUNDLE, last_only=last_only))
    driver = CaseDriver(case, np.concatenate(case.prompts), tick)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        stream = Comparator.run(runners, data_loader=driver.feeds(), streaming=True)
        Comparator.compare_accuracy(stream, comparisons=pairs, compare_func=driver.compare)
    driver.log.seconds = time.perf_counter() - began
    return driver.log


def choose_provider(manifest: Manifest, provider: str, as_dtype: str | None) -> str:
    """"cpu" or "cuda"; NotCheckedHere where the bundle's target or number format cannot run on it."""
    if manifest.target.startswith("trt"):
        raise NotCheckedHere(f"a {manifest.target} bundle runs in TensorRT only", "target",
                             "validate the same checkpoint exported with --target ort")
    if as_dtype not in (None, "fp32"):
        raise GqaExportError(f"--as {as_dtype} is not offered", "--as", "use --as fp32")
    import onnxruntime

    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if provider == "cuda" and not has_cuda:
        raise NotCheckedHere("this ONNX Runtime has no CUDA provider", "--provider cuda",
                             "pip install 'gqa-export[gpu]' on a machine with a GPU, or use --provider cpu")
    chosen = "cuda" if provider == "auto" and has_cuda else "cpu" if provider == "auto" else provider
    if chosen == "cpu" and manifest.dtype == "bf16" and as_dtype is None:
        raise NotCheckedHere("ONNX Runtime's CPU provider cannot run bf16", f"dtype {manifest.dtype}",
                             "export with --dtype fp32, or check the fp32 twin with `validate --as fp32`")
    return chosen


@contextmanager
def _twin(folder: Path, as_dtype: str) -> Iterator[tuple[Manifest, Path]]:
    from .graph.twin import write_twin

    with tempfile.TemporaryDirectory(prefix="gqa-export-twin-") as place:
        yield write_twin(folder, Path(place)), Path(place)


@contextmanager
def _bundle_session(folder: Path, manifest: Manifest, provider: str) -> Iterator[tuple[Session, Callable]]:
    from .run.ort import OrtSession
    from .run.polygraphy_runner import PoisonedTail, onnxrt_infer

    with onnxrt_infer(folder / MODEL, provider) as infer:
        tail = PoisonedTail(infer, manifest.spec)
        yield OrtSession.load(folder, provider, infer=tail), lambda value: setattr(tail, "value", value)


def _pytorch(against: str | Path, manifest: Manifest, ran: Manifest) -> tuple[Any, Session, Session | None, list[str]]:
    """The checkpoint and PyTorch's sessions: fp64, and the number format that is run.

    A twin holds the bundle's rounded weights, so its truth is the checkpoint rounded to the bundle's format.
    """
    from .checkpoint import open_checkpoint
    from .run.torch_ref import TorchSession

    checkpoint = open_checkpoint(against)
    model = checkpoint.load_model(manifest.dtype if ran.dtype != manifest.dtype else "fp32")
    truth = TorchSession(model, manifest.capacity, "fp64", spec=manifest.spec)
    eager = TorchSession(model, manifest.capacity, ran.dtype, spec=manifest.spec)
    return checkpoint, truth, eager, []


def _shown(truth: Any) -> dict[str, object]:
    """What the checkpoint's model shows of itself in one step."""
    truth.reset(1)
    logits = truth.step(np.zeros((1, 1), np.int64)).logits
    shown: dict[str, object] = {"model_type": truth.model.config.model_type, "vocabulary": logits.shape[-1]}
    pairs = truth.cache()
    shown["layers"] = len(pairs)
    for number, (key, value) in enumerate(pairs):
        shown[f"key {number}"] = (key.shape[1], key.shape[3])
        shown[f"value {number}"] = (value.shape[1], value.shape[3])
    if not np.isfinite(logits).all():
        raise GqaExportError("the checkpoint itself gives NaN or infinite logits", "checkpoint",
                             "check its weights; there is nothing to compare with")
    truth.reset(1)
    return shown


def _special(manifest: Manifest) -> Iterable[int]:
    """Ids that random prompts avoid."""
    found = [manifest.tokens.get(name) for name in ("eos", "bos", "pad")]
    return [int(i) for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids])]


def _original_positions(truth: Any) -> int:
    """`original_max_position_embeddings` of a scaled rotary, 0 if there is none."""
    rope = getattr(truth.model.config, "rope_parameters", None) or {}
    tables = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return max((int(table.get("original_max_position_embeddings") or 0) for table in tables), default=0)


def _text_ids(checkpoint: Any, folder: Path) -> np.ndarray | None:
    """Token ids of a few English sentences, if the bundle carries a tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer

    return np.array(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids, np.int64)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("gqa-export", "torch", "transformers", "onnxruntime", "onnxruntime-gpu", "polygraphy", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


__all__ = ["Sides", "choose_provider", "run_case", "run_cases", "validate"]
