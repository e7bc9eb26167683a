"""Checks one architecture from its checkpoint to validated bundles: the row behind `docs/models.md`.

Both targets and both caches go through the normal pipeline and the normal validation, at small size. Every way in
which this can end is a verdict: `supported`, `refused` (with the reason), `wrong` (outputs differ from PyTorch's) or
`failed` (an exception that is not a refusal). The last two are bugs.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gqa_export.checkpoint.load_config import load_config
from gqa_export.errors import GqaExportError, cause_of

SUPPORTED, REFUSED, WRONG, FAILED = "supported", "refused", "wrong", "failed"
TARGETS = ("ort", "portable")
CACHES = ("growing", "static")
CAPACITY = 96
"""holds a prompt past the small models' window of 16 (or 32) and the decode steps"""
STEPS = 8
"""decode steps of each case: the ragged case then has its two uneven ones"""


@dataclass
class Row:
    """What is known of one architecture. worst: per "target/cache", the largest |logit difference| to PyTorch in
    fp64, and the bound it was held to. features: what its attention needs. states: what its layers keep beside keys and
    values. depth: how depth was made."""

    name: str
    architecture: str
    verdict: str
    reason: str = ""
    features: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    worst: dict[str, list[float]] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    depth: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data; empty fields are left out."""
        return {key: value for key, value in asdict(self).items() if value or key == "verdict"}


def check(name: str, architecture: str, checkpoint: Path, *, targets: tuple[str, ...] = TARGETS,
          caches: tuple[str, ...] = CACHES, depth: bool = True) -> Row:
    """Export `checkpoint` to every target and cache, validate each, and prove its depth. Never raises."""
    row, began = Row(name, architecture, SUPPORTED), time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="gqa-matrix-") as work, _traces_kept(Path(work) / "traces"):
            for cache in caches:
                for target in targets:
                    _one(row, checkpoint, Path(work) / f"{target}-{cache}", target, cache)
                    if row.verdict != SUPPORTED:
                        return row
            if depth:
                row.depth = prove_depth(checkpoint)
    except GqaExportError as refusal:
        row.verdict, row.reason = REFUSED, f"{refusal.what} [{_short(refusal.where, checkpoint)}]"
    except Exception as error:
        row.verdict = FAILED
        row.reason = f"{cause_of(error)} [{_spot(error)}]"
    finally:
        row.seconds = round(time.perf_counter() - began, 1)
    return row


def add_depth(known: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """A supported row again, with its depth proved; `failed` if the proof fails. Never raises."""
    began = time.perf_counter()
    try:
        return {**known, "depth": prove_depth(checkpoint)}
    except Exception as error:
        return {**known, "verdict": FAILED, "reason": f"{cause_of(error)} [{_spot(error)}]",
                "seconds": round(time.perf_counter() - began, 1)}


def _one(row: Row, checkpoint: Path, bundle: Path, target: str, cache: str) -> None:
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx
    from gqa_export.validation.validate import validate

    text_only = multimodal(checkpoint)
    export = export_onnx(checkpoint, bundle, ExportOptions(target=target, cache=cache, capacity=CAPACITY,
                                                           provider="cpu", text_only=text_only))
    spec = export.manifest.spec
    row.features = features_of(spec) + (["--text-only"] if text_only else [])
    row.states = states_of(spec)
    row.fallbacks = sorted({*row.fallbacks, *(fallback.reason for fallback in export.manifest.fallbacks
                                              if fallback.layer >= 0)})
    verdict = validate(bundle, checkpoint, steps=STEPS, provider="cpu", check_hashes=False)
    logits = [kind for case in verdict.cases for kind in case.kinds if kind.kind == "logits"]
    worst = max(logits, key=lambda kind: kind.max_abs / kind.bound if kind.bound else kind.max_abs)
    row.worst[f"{target}/{cache}"] = [float(f"{worst.max_abs:.2g}"), float(f"{worst.bound:.2g}")]
    if not verdict.passed:
        row.verdict, row.reason = WRONG, f"{target}, {cache} cache: {verdict.first}"


def multimodal(checkpoint: Path) -> bool:
    """Whether a checkpoint is more than a language model: then its text decoder is what a row is about."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return any(isinstance(config.get(f"{part}_config"), dict) for part in ("text", "vision", "audio"))


def features_of(spec: Any) -> list[str]:
    """What a decoder's attention layers are, in words; sorted."""
    found = set()
    for layer in spec.layers:
        heads, kv = layer.num_heads, layer.kv_num_heads
        found.add("MHA" if heads == kv else "MQA" if kv == 1 else "GQA")
        found |= {word for word, there in (
            ("window", layer.window), ("chunks", layer.chunk), ("softcap", layer.softcap), ("sinks", layer.sinks),
            ("D != E", layer.head_size != layer.value_head_size)) if there}
    if len({(layer.num_heads, layer.kv_num_heads, layer.head_size) for layer in spec.layers}) > 1:
        found.add("layers differ in heads")
    return sorted(found)


STATES = {
    "causal_conv1d_fn": "convolution", "chunk_gated_delta_rule": "gated delta rule",
    "chunk_kda": "Kimi delta attention", "mamba_chunk_scan_combined": "Mamba-2 scan", "selective_scan_fn": "Mamba scan",
}  # fmt: skip
"""what keeps a state, by the name of its kernel"""


def states_of(spec: Any) -> list[str]:
    """What a decoder's layers keep beside keys and values, in words; sorted."""
    return sorted({STATES.get(state.kernel, state.kernel) for state in spec.states})


def prove_depth(checkpoint: Path) -> str:
    """How depth is made: stamped and equal to the full trace by structural hash, or traced whole, and why."""
    from evidence.output_hashes import output_hashes
    from gqa_export.checkpoint.open import open_checkpoint
    from gqa_export.trace.tracing import trace

    config = load_config(open_checkpoint(checkpoint, text_only=multimodal(checkpoint)))
    options: dict[str, Any] = {"dtype": "float32", "cache": "growing", "capacity": CAPACITY}
    stamped = trace(config, **options)
    if stamped.whole_because:
        return f"whole: {stamped.whole_because}"
    whole = trace(config, **options, stamping=False)
    layers = f"{stamped.traced_layers} of {whole.traced_layers} traced"
    if output_hashes(stamped.model) != output_hashes(whole.model):
        raise RuntimeError(f"the stamped model ({layers}) is not the fully traced one")
    return f"stamped: {layers}, structural hash equal"


@contextmanager
def _traces_kept(folder: Path) -> Iterator[None]:
    """Both targets share one trace: kept on disk meanwhile, unless the caller keeps traces already."""
    import os

    from gqa_export.trace.trace_cache import FOLDER

    given = os.environ.get(FOLDER)
    if not given:
        os.environ[FOLDER] = str(folder)
    try:
        yield
    finally:
        if not given:
            del os.environ[FOLDER]


def _short(where: str, checkpoint: Path) -> str:
    """Where a refusal was, without the folder it happened in."""
    return str(where).replace(f"{checkpoint}, ", "").replace(str(checkpoint), "the checkpoint")


def _spot(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else ""
