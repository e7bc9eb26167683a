"""A checkpoint, a text and lengths -> what approximate attention costs, without an export."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compare.long_quality import LEAST_GAIN, FewerLayers, LengthQuality, LongQuality
from ..errors import GqaExportError
from ..long_attention_op import LongPlan, LongSetting
from ..progress import Progress
from ..spec import ModelSpec
from .layers import LayerWatch
from .measure import Measurement, Sequence, text_tokens

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

PARTS = 4
"""the loss over layers has at most so many points"""

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
    plan = LongPlan(setting, layers(spec), seed)
    tokens = text_tokens(checkpoint, text, max(lengths))
    sequences = [Sequence.of(tokens, length, setting.leaf, str(text)) for length in lengths]
    report("loading the model", None, None)
    return quality_of(load(checkpoint), spec, plan, sequences, str(text), checkpoint.source, max_loss=max_loss,
                      min_copy=min_copy, report=report)


def quality_of(model: Any, spec: ModelSpec, plan: LongPlan, sequences: abc.Sequence[Sequence], text: str, source: str,
               *, max_loss: float | None, min_copy: float | None, report: Progress) -> LongQuality:
    """Measure a model that is loaded, with the attention `gqa_export.long_context.attention.NAME`.

    Args:
        model, spec: the module, and what is known of it.
        plan: what is approximated, and how.
        sequences: one of each length.
        text, source: names, for the report.
        max_loss, min_copy: the bounds of the report. report: called with what is done.

    Raises:
        UnsupportedModel: the model's attention cannot be replaced.
    """
    found: list[LengthQuality] = []
    fewer: tuple[FewerLayers, ...] = ()
    for number, sequence in enumerate(sequences):
        report(f"measuring approximate attention on {len(sequence.ids)} tokens", number, len(sequences))
        watch = LayerWatch(plan.setting, plan.seed, frozenset(plan.layers))
        measurement = Measurement(model, spec, plan.setting, plan.seed, sequence, source)
        measurement.look(watch)
        quality = measurement.of(plan.layers, whole=True)
        found.append(replace(quality, layers=tuple(watch.found[layer] for layer in sorted(watch.found))))
        if len(sequence.ids) == min(len(each.ids) for each in sequences):
            fewer = (*_fewer(measurement, plan.layers), FewerLayers(len(plan.layers), quality.loss, quality.copy_score))
    exact = [layer.layer for layer in spec.layers if layer.edges]
    notes = [f"layers {exact} have a window or chunks and stay exact"] if exact else []
    notes += [f"{each.tokens} tokens: the exact model gains less than {LEAST_GAIN:g} nats on a repeated passage, so "
              "that copying is not judged" for each in found if each.copy_score is None]
    return LongQuality(source, text, plan.setting.method, plan.setting.attributes(), plan.seed, plan.layers, max_loss,
                       min_copy, tuple(found), tuple(notes), fewer)


def _fewer(measurement: Measurement, layers: tuple[int, ...]) -> Iterator[FewerLayers]:
    """The loss with a part of the layers approximated, the last ones: no layer before them has to run again."""
    for part in sorted({part * len(layers) // PARTS for part in range(1, PARTS)} - {0}):
        quality = measurement.of(layers[-part:])
        yield FewerLayers(part, quality.loss, quality.copy_score)
