"""Which layers can be approximated within bounds of loss and copying, by measurement.

Every layer is approximated alone, and the layers are ordered by the harm it does. Of that order as many are taken as
the bounds allow together; what is taken is measured as a whole, so that no sum of single harms has to be believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..compare.long_quality import LengthQuality
from ..errors import GqaExportError
from ..long_attention_op import LongSetting
from ..progress import Progress
from ..spec import ModelSpec
from .measure import Measurement, Sequence, text_tokens

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

LENGTH = 4096
"""tokens that layers are chosen on, or four leaves where those are more"""


@dataclass(frozen=True)
class Choice:
    """Layers, in order; the quality with all of them; the quality of each candidate alone."""

    layers: tuple[int, ...]
    quality: LengthQuality
    alone: dict[int, LengthQuality]


def choose_layers(checkpoint: Checkpoint, text: Path, spec: ModelSpec, setting: LongSetting, seed: int, *,
                  max_loss: float, min_copy: float, report: Progress) -> Choice:
    """Choose layers of a checkpoint on a text.

    Raises:
        GqaExportError: not even one layer can be approximated within the bounds, or the text is too short.
    """
    from .attention import load

    report("reading the text", None, None)
    length = max(LENGTH, 4 * setting.leaf)
    sequence = Sequence.of(text_tokens(checkpoint, text, length), length, setting.leaf, str(text))
    measurement = Measurement(load(checkpoint), spec, setting, seed, sequence, checkpoint.source)
    return choose(measurement, max_loss=max_loss, min_copy=min_copy, report=report)


def choose(measurement: Measurement, *, max_loss: float, min_copy: float, report: Progress) -> Choice:
    """Choose layers of a model whose exact run is known.

    Raises:
        GqaExportError: not even one layer can be approximated within the bounds.
    """
    able = [layer.layer for layer in measurement.spec.layers if not layer.edges]
    alone = {}
    for number, layer in enumerate(able):
        report("measuring each layer", number, len(able))
        alone[layer] = measurement.of((layer,))

    def harm(layer: int) -> float:
        found, score = alone[layer], alone[layer].copy_score
        lost = max(0.0, found.loss) / max(max_loss, 1e-9)
        return lost + (0.0 if score is None else max(0.0, 1 - score) / max(1 - min_copy, 1e-9))

    def good(found: LengthQuality) -> bool:
        return found.loss <= max_loss and (found.copy_score is None or found.copy_score >= min_copy)

    order = sorted(able, key=lambda layer: (harm(layer), layer))
    best: tuple[tuple[int, ...], LengthQuality] | None = None
    low, high = 1, len(order)
    while low <= high:  # the most layers that keep the bounds: all first, then halves
        count = high if best is None and low == 1 and high == len(order) else (low + high) // 2
        report(f"measuring {count} layers together", None, None)
        layers = tuple(sorted(order[:count]))
        found = alone[layers[0]] if count == 1 else measurement.of(layers)
        if good(found):
            best, low = (layers, found), count + 1
        else:
            high = count - 1
    if best is None:
        told = (f"layer {order[0]} alone loses {alone[order[0]].loss:+.4f} nats" if order else
                "every layer has a window or chunks")
        raise GqaExportError(f"no layer can be approximated within the bounds: {told}", "--long-layers auto",
                             "allow more with --max-loss and --min-copy, read more keys with --long-heavy and "
                             "--long-samples, or name the layers", code="E-OPTION-LONG-BOUNDS")
    return Choice(best[0], best[1], alone)
