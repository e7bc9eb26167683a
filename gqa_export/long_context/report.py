"""A checkpoint, a text and lengths -> what approximate attention costs, without an export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..compare.long_quality import LengthQuality, LongQuality
from ..errors import GqaExportError
from ..long_attention_op import LongSetting
from ..progress import Progress
from ..spec import ModelSpec
from .layers import LayerWatch
from .measure import Measurement, Sequence, text_tokens

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

Layers = Callable[[ModelSpec], tuple[int, ...]]


def measure_quality(checkpoint: Checkpoint, text: Path, lengths: tuple[int, ...], setting: LongSetting, layers: Layers,
                    *, seed: int, max_loss: float, min_copy: float, report: Progress) -> LongQuality:
    """Measure a checkpoint.

    Args:
        checkpoint: opened.
        text: a file in UTF-8, of more tokens than the longest length.
        lengths: tokens of the prompts, in order.
        setting: how attention is approximated. seed: of its tables.
        layers: which, of a model's spec.
        max_loss, min_copy: the bounds of the report.
        report: called with what is done.

    Raises:
        GqaExportError: the lengths or the text do not fit. UnsupportedModel: the model's attention cannot be replaced.
    """
    from ..checkpoint.load_config import load_config
    from ..trace.probe.layer_probe import probe
    from .attention import load

    if not lengths or min(lengths) < 1:
        raise GqaExportError("no length to measure was given", "--lengths", "give lengths such as 4096,8192",
                             code="E-OPTION-LENGTHS")
    spec = probe(load_config(checkpoint))
    longest = spec.max_positions
    if longest and max(lengths) > longest:
        raise GqaExportError(f"{max(lengths)} tokens are beyond the model's {longest} positions", "--lengths",
                             f"use lengths up to {longest}", code="E-OPTION-LENGTHS")
    chosen = layers(spec)
    tokens = text_tokens(checkpoint, text, max(lengths))
    sequences = [Sequence.of(tokens, length, setting.leaf, str(text)) for length in lengths]
    report("loading the model", None, None)
    model = load(checkpoint)
    found: list[LengthQuality] = []
    for number, sequence in enumerate(sequences):
        report(f"measuring {lengths[number]} tokens", number, len(sequences))
        watch = LayerWatch(setting, seed, frozenset(chosen))
        measurement = Measurement(model, spec, setting, seed, sequence, checkpoint.source)
        measurement.look(watch)
        quality = measurement.of(chosen, whole=True)
        found.append(replace(quality, layers=tuple(watch.found[layer] for layer in sorted(watch.found))))
    exact = [layer.layer for layer in spec.layers if layer.edges]
    notes = [f"layers {exact} have a window or chunks and stay exact"] if exact else []
    notes += [f"{each.tokens} tokens: the exact model gains less than 0.1 nats on a repeated passage, so that copying "
              "is not judged" for each in found if each.copy_score is None]
    return LongQuality(checkpoint.source, str(text), setting.method, setting.attributes(), seed, chosen, max_loss,
                       min_copy, tuple(found), tuple(notes))
