"""Measures what a bundle lost: its logits on a text beside those of the checkpoint before it was quantized, in PyTorch.

The text is read in windows without overlap, each with an empty cache, as perplexity usually is; the windows are fed in
pieces whose logits fit in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.manifest import Manifest
from ..bundle.source_checkpoint import open_for
from ..checkpoint.checkpoint import Checkpoint
from ..compare.cases import LOGIT_ELEMENTS
from ..compare.loss import SHIPPED_TEXT, Loss, LossTally
from ..errors import GqaExportError, InvalidCheckpoint, NotCheckedHere
from ..progress import Progress
from ..runtime.session import Session
from .reference import Reference
from .suite_setting import encoded, read_text

WINDOW = 512
"""tokens that are read with one cache"""
MOST_TOKENS = 2048
"""tokens of a text that are read: enough for three digits of the mean, and half a minute for a small model"""
SHIPPED = Path(__file__).with_name("loss_text.txt")


@dataclass(frozen=True)
class LossRequest:
    """What is to be measured.

    Attributes:
        reference: the checkpoint before it was quantized; None: nothing is measured.
        text: a UTF-8 file; None: the shipped text.
        max_kl, max_perplexity_increase: most that the mean KL divergence, in nats, and the increase of perplexity, in
            percent, may be.
        calibrate: the text with which the bundle's scales were chosen, for the comparison itself.
    """

    reference: str | Path | Checkpoint | None = None
    text: Path | None = None
    max_kl: float | None = None
    max_perplexity_increase: float | None = None
    calibrate: Path | None = None

    def check(self) -> None:
        """Refuse limits that nothing would be held against, and numbers that are not limits."""
        for option, value in (("--max-kl", self.max_kl), ("--max-perplexity-increase", self.max_perplexity_increase)):
            if value is None:
                continue
            if not (math.isfinite(value) and value >= 0):
                raise GqaExportError(f"a limit must be a number of at least 0, got {value:g}", option,
                                     "give a limit such as 0.05", code="E-OPTION-LIMIT")
            if self.reference is None:
                raise GqaExportError("a limit of the loss needs a checkpoint to measure the loss against", option,
                                     "name the checkpoint before it was quantized with --reference",
                                     code="E-OPTION-REFERENCE")


def check_reference(request: LossRequest, manifest: Manifest, folder: Path) -> None:
    """Refuse what `measure_loss` cannot measure against, before the comparison: a checkpoint that is not there or that
    predicts other tokens, a text that cannot be read.

    Raises:
        GqaExportError: the text or the checkpoint does not fit the bundle.
        InvalidCheckpoint: there is no checkpoint.
    """
    if request.reference is None:
        return
    from ..checkpoint.load_config import load_config

    _token_ids(request, folder, [])
    checkpoint = open_for(manifest, request.reference)
    size = getattr(load_config(checkpoint).get_text_config(), "vocab_size", None)
    if isinstance(size, int):
        _check_vocabulary(manifest, size, checkpoint)


def _check_vocabulary(manifest: Manifest, size: int, checkpoint: Checkpoint) -> None:
    if size != manifest.spec.vocabulary:
        raise GqaExportError(f"the bundle predicts {manifest.spec.vocabulary} tokens, the reference {size}: their "
                             "predictions cannot be compared", f"--reference {checkpoint.source}",
                             "name the checkpoint that the bundle was quantized from", code="E-VALIDATE-REFERENCE")


def measure_loss(request: LossRequest, session: Session, manifest: Manifest, folder: Path, known: Reference,
                 notes: list[str], report: Progress) -> Loss | None:
    """Measure a bundle's loss; None where none was requested.

    Args:
        request: what to measure.
        session: the bundle's, as shipped.
        manifest, folder: of the bundle; its tokenizer encodes the text.
        known: PyTorch, opened for the comparison; it serves here too where its checkpoint is the same.
        notes: takes a line where less than the text was read.
        report: called with what is done.

    Raises:
        GqaExportError: the text or the checkpoint does not fit the bundle.
        InvalidCheckpoint: the reference's own logits are NaN.
        NotCheckedHere: there is no room for the reference.
    """
    if request.reference is None:
        return None
    ids, name = _token_ids(request, folder, notes)
    report("loading the checkpoint to measure the loss against", None, None)
    reference, dtype = _reference_session(request.reference, manifest, known)
    size = min(WINDOW, manifest.capacity)
    windows = [window for window in (ids[start: start + size] for start in range(0, len(ids), size)) if len(window) > 1]
    tally, done = LossTally(), 0
    for window in windows:
        tally.begin()
        for piece, expected, got in _logits(reference, session, window, manifest):
            if not np.isfinite(expected).all():
                raise InvalidCheckpoint("the reference's own logits are NaN or infinite", str(request.reference),
                                        "check its weights; there is nothing to measure against", code="E-CKPT-NAN")
            tally.add(piece, expected, got)
            done += len(piece)
            report("measuring the loss", done, len(ids))
    source = request.reference
    return tally.loss(source.source if isinstance(source, Checkpoint) else str(source), dtype, name,
                      hashlib.sha256(ids.tobytes()).hexdigest(), len(windows), request.max_kl,
                      request.max_perplexity_increase)


def _token_ids(request: LossRequest, folder: Path, notes: list[str]) -> tuple[np.ndarray, str]:
    """The tokens to read, and what the report calls their text."""
    if request.text is not None:
        ids, name = read_text(folder, request.text), request.text.name
    else:
        shipped = encoded(folder, SHIPPED.read_text(encoding="utf-8"))
        if shipped is None:
            raise GqaExportError("the loss is measured on text, and the bundle has no tokenizer", str(folder),
                                 "leave out --reference, or export a checkpoint that has a tokenizer",
                                 code="E-VALIDATE-TOKENIZER")
        ids, name = shipped, SHIPPED_TEXT
    if len(ids) > MOST_TOKENS:
        notes.append(f"the loss was measured on the first {MOST_TOKENS} tokens of {name}")
    return ids[:MOST_TOKENS], name


def _reference_session(source: str | Path | Checkpoint, manifest: Manifest, known: Reference) -> tuple[Any, str]:
    """PyTorch over the checkpoint before it was quantized, and its number format: fp32, whose own error is a
    thousandth of the smallest loss of a quantized model, or the fp64 reference where it is the same checkpoint."""
    import psutil

    from ..checkpoint.content import model_digest
    from ..checkpoint.load_model import load_model
    from ..runtime.torch_session import TorchSession

    checkpoint = open_for(manifest, source)
    if known.plain and known.digest and model_digest(checkpoint) == known.digest:
        return known.session, known.dtype
    needed = 4 * sum(parameter.numel() for parameter in known.model.parameters())
    room = psutil.virtual_memory().available
    if needed > room:
        raise NotCheckedHere(f"measuring the loss needs {needed / 1e9:.0f} GB of memory, {room / 1e9:.0f} are free",
                             checkpoint.source, "validate on a machine with more memory", code="E-VALIDATE-MEMORY")
    session = TorchSession(load_model(checkpoint, "float32"), manifest.capacity, "float32")
    _check_vocabulary(manifest, session.step(np.zeros((1, 1), np.int64)).logits.shape[-1], checkpoint)
    return session, "float32"


def _logits(reference: Any, bundle: Session, ids: np.ndarray,
            manifest: Manifest) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each piece of a window: its tokens, the reference's and the bundle's logits [T, V] of every one of them.

    A bundle that gives only the last token's logits is fed one token at a time."""
    chunk = max(16, LOGIT_ELEMENTS // manifest.spec.vocabulary)
    reference.reset(1)
    bundle.reset(1)
    for start in range(0, len(ids), chunk):
        piece = ids[None, start: start + chunk]
        expected = reference.step(piece).logits[0]
        steps = [piece] if manifest.logits == "all" else [piece[:, t: t + 1] for t in range(piece.shape[1])]
        yield piece[0], expected, np.concatenate([bundle.step(step).logits[0] for step in steps])
