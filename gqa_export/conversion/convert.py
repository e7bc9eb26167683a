"""Checkpoint -> checkpoint with fewer key/value heads: choose K, pool each layer, write, report.

Source of the method: Ainslie et al., 2023 (arXiv:2305.13245). Only one layer is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.decided import decided_by_weights
from ..checkpoint.load_config import load_config
from ..checkpoint.unused_tensors import unused_notes
from ..errors import GqaExportError
from ..files.staging import check_folder, writing_folder
from ..progress import Progress, silent
from .assemble import assemble, changed
from .checkpoint_writer import Stored, write_checkpoint
from .head_similarity import similar
from .heads import LayerHeads
from .options import ConvertOptions, candidates, check_options, fewest, heads_per_layer, worst
from .pooling import Groups, Pooled, contiguous, mappable, pool
from .structure import Structure, structure_of, with_kv_heads
from .weight_error import LayerError, knee, weight_errors

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

REPORT = "gqa_convert.json"
SAMPLED = 8


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        folder: the converted checkpoint.
        method: how heads were pooled.
        grouping: which heads were pooled together.
        kv_heads_before: of each layer of the source.
        kv_heads: of each layer now.
        cache_bytes_before: of one token over all layers of the source, in the stored type.
        cache_bytes: the same now.
        layers: errors of every layer.
        errors_by_kv_heads: the largest error of a layer's attention output for every number of heads that was tried,
            from weights alone (over all layers for "auto", else over SAMPLED of them).
        suggested_kv_heads: the number after which the error rises steeply; None if there is not such a number.
        groups: of each layer, the source heads of every new head.
        notes: what limits the result.
        source: what was converted.
        settings: the options.
    """

    folder: str
    method: str
    grouping: str
    kv_heads_before: tuple[int, ...]
    kv_heads: tuple[int, ...]
    cache_bytes_before: int
    cache_bytes: int
    layers: tuple[LayerError, ...]
    errors_by_kv_heads: dict[int, float]
    suggested_kv_heads: int | None
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    notes: tuple[str, ...] = ()
    source: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The report, as written beside the weights."""
        return json.dumps(asdict(self), indent=1) + "\n"


def convert(checkpoint: Checkpoint, output: Path, options: ConvertOptions,
            report: Progress | None = None) -> Conversion:
    """Write a checkpoint with fewer key/value heads, and report what it cost. On an error nothing is left behind.

    Args:
        checkpoint: an opened Hugging Face checkpoint with safetensors.
        output: folder to write; it must not exist, or be an earlier result and `options.force` set.
        options: see `ConvertOptions`.
        report: progress; None reports nothing.

    Returns:
        Errors of every layer, cache sizes, groups; the same is in gqa_convert.json beside the weights.

    Raises:
        GqaExportError: an option is wrong, or no number of heads keeps the error within `max_error`.
        InvalidCheckpoint: tensors are missing or have another shape.
        UnsupportedModel: keys and values of the architecture cannot be pooled.
    """
    progress = report or silent
    check_folder(Path(output), force=options.force, marker=REPORT)
    check_options(checkpoint, options)
    progress("finding the heads in the model's weights", None, None)
    decided = decided_by_weights(checkpoint)
    source = structure_of(decided.config)
    stored = Stored(checkpoint, source, decided.untied)
    notes = unused_notes(checkpoint, (), options.ignore_unused)
    counts = candidates(source)
    chosen = heads_per_layer(options, source)
    if options.method == "calibrated":
        return _convert_calibrated(checkpoint, Path(output), options, source, stored, chosen, progress, notes)
    if chosen:
        with_kv_heads(source, chosen)  # refused now, not after measuring
    errors = _curve(source, stored, options, counts, chosen, progress)
    kv_heads = chosen or fewest(errors, options, counts)
    target, fields = with_kv_heads(source, kv_heads)
    layers, groups = _errors(source, stored, options, kv_heads, progress)

    @lru_cache(maxsize=2)  # a layer may lie in two files
    def layer_tensors(layer: int) -> dict[str, torch.Tensor]:
        heads = LayerHeads(source.layers[layer], stored.read)
        return assemble(heads, target.layers[layer], pool_layer(heads, options, source, groups[layer]))

    in_place = options.grouping == "contiguous" and options.method != "svd"
    owner = {name: index for index, layer in enumerate(source.layers) for name in changed(layer, in_place)}

    def make(name: str) -> torch.Tensor:
        made = layer_tensors(owner[name])
        return made[name] if name in made else stored.read(name)

    result = summary(checkpoint, Path(output), options, source, target, tuple(layers), errors,
                     tuple(groups), notes)
    with writing_folder(Path(output), force=options.force, marker=REPORT) as folder:
        write_checkpoint(folder, stored, {name: target.shapes[name] for name in owner}, make, fields, progress)
        (folder / REPORT).write_text(result.to_json(), encoding="utf-8")
    return result


def _convert_calibrated(checkpoint: Checkpoint, output: Path, options: ConvertOptions, source: Structure,
                        stored: Stored, chosen: tuple[int, ...] | None, progress: Progress,
                        notes: tuple[str, ...]) -> Conversion:
    from .calibration import Calibration, calibration_rows, write_calibrated

    assert options.text is not None
    if chosen:
        with_kv_heads(source, chosen)  # refused now, not after minutes
    rows = calibration_rows(checkpoint, source.config, options.text, options.tokens)
    calibration = Calibration(checkpoint, stored, source, rows, options.grouping, progress)
    if chosen is None:
        measured = {}
        for count in reversed(candidates(source)):
            measured[count], _ = calibration.run([count] * len(source.layers), lambda layer, tensors: None)
            if worst(measured[count]) <= (options.max_error or 0):
                break
        chosen = fewest(measured, options, sorted(measured, reverse=True))
    curve = _curve(source, stored, options, candidates(source), chosen, progress)
    target, _ = with_kv_heads(source, chosen)
    results = []

    def finish(folder: Path, errors: list[LayerError], pooled: list[Pooled]) -> None:
        groups = tuple(layer.groups for layer in pooled)
        results.append(summary(checkpoint, output, options, source, target, tuple(errors), curve, groups, notes))
        (folder / REPORT).write_text(results[0].to_json(), encoding="utf-8")

    write_calibrated(calibration, output, chosen, options.force, REPORT, finish)
    return results[0]


def summary(checkpoint: Checkpoint, output: Path, options: ConvertOptions, source: Structure, target: Structure,
            layers: tuple[LayerError, ...], errors: dict[int, list[LayerError]],
            groups: tuple[tuple[tuple[int, ...], ...], ...], notes: tuple[str, ...] = ()) -> Conversion:
    """The report of a conversion. notes: on the checkpoint."""
    curve = {count: worst(rows) for count, rows in sorted(errors.items())}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    return Conversion(
        str(output), options.method, options.grouping, source.kv_heads, target.kv_heads,
        cache_bytes(source, checkpoint.stored_dtype), cache_bytes(target, checkpoint.stored_dtype), layers, curve,
        knee({**curve, max(source.kv_heads): 0.0}), groups, (*notes, *_notes(source, options)), checkpoint.source,
        settings)


def _notes(source: Structure, options: ConvertOptions) -> tuple[str, ...]:
    notes = []
    if any("key" not in layer.linear for layer in source.layers):
        notes.append("a norm follows the key projection: keys are pooled before it, and are not turned or scaled")
    if options.method in ("svd", "calibrated") and any(not mappable(layer)[1] for layer in source.layers):
        notes.append("something lies between attention and its output projection: values are averaged, not fitted")
    return tuple(notes)


def cache_bytes(structure: Structure, dtype: str) -> int:
    """Bytes of keys and values of one token over all layers."""
    from ..weights.dtypes import itemsize

    return sum(len(layer.key.starts) * (layer.key.size + layer.value.size) for layer in structure.layers) * \
        itemsize(dtype)


def groups_of(heads: LayerHeads, options: ConvertOptions, kv_heads: int) -> Groups:
    """Which heads of a layer are pooled together."""
    if options.grouping == "similarity":
        return similar(heads, kv_heads)
    return contiguous(len(heads.layout.key.starts), kv_heads)


def pool_layer(heads: LayerHeads, options: ConvertOptions, source: Structure, groups: Groups) -> Pooled:
    """One layer by the chosen method, from weights alone."""
    method = "svd" if options.method == "calibrated" else options.method
    spread = float(getattr(source.config, "initializer_range", None) or 0.02)
    return pool(heads, groups, method, align=options.grouping == "similarity", seed=options.seed, spread=spread)


def _errors(source: Structure, stored: Stored, options: ConvertOptions, kv_heads: Sequence[int],
            progress: Progress) -> tuple[list[LayerError], list[Groups]]:
    """The error of every layer with so many heads, and which of its heads are pooled together."""
    errors, groups = [], []
    for index, layer in enumerate(source.layers):
        progress(f"measuring layer {index}", index, len(source.layers))
        heads = LayerHeads(layer, stored.read)
        groups.append(groups_of(heads, options, kv_heads[index]))
        errors.append(weight_errors(heads, pool_layer(heads, options, source, groups[index])))
    return errors, groups


def _curve(source: Structure, stored: Stored, options: ConvertOptions, counts: Sequence[int],
           chosen: Sequence[int] | None, progress: Progress) -> dict[int, list[LayerError]]:
    """By number of heads: the errors of all layers if they decide, else of some spread over the model."""
    found: dict[int, list[LayerError]] = {count: [] for count in counts}
    depth = len(source.layers)
    looked_at = range(depth) if chosen is None or depth <= SAMPLED else \
        sorted({round(i * (depth - 1) / (SAMPLED - 1)) for i in range(SAMPLED)})
    for index in looked_at if counts else ():
        progress(f"looking at layer {index}", index, depth)
        heads = LayerHeads(source.layers[index], stored.read)
        for count in counts:
            pooled = pool_layer(heads, options, source, groups_of(heads, options, count))
            found[count].append(weight_errors(heads, pooled))
    return found


def expand(checkpoint: Checkpoint, output: Path, kv_heads: int, order: Sequence[int] | None = None) -> None:
    """The inverse, exact: every key/value head repeated until there are `kv_heads`. The model computes the same.

    Args:
        checkpoint: an opened Hugging Face checkpoint.
        output: folder to write.
        kv_heads: a multiple of the present number.
        order: a permutation of the new heads, queries and output columns moved along (a test of grouping); None keeps
            their order.

    Raises:
        GqaExportError: `kv_heads` is not a multiple of the present number.
        UnsupportedModel: the architecture cannot have so many heads.
    """
    source = structure_of(load_config(checkpoint))
    if any(kv_heads % now for now in source.kv_heads):
        raise GqaExportError(f"{kv_heads} key/value heads are not a multiple of the model's {source.kv_heads[0]}",
                             checkpoint.source, "repeat every head the same number of times",
                             code="E-CONVERT-NOT-A-MULTIPLE")
    stored = Stored(checkpoint, source)
    target, fields = with_kv_heads(source, [kv_heads] * len(source.layers))
    order = list(order if order is not None else range(kv_heads))
    owner = {name: index for index, layer in enumerate(source.layers) for name in changed(layer, False)}

    @lru_cache(maxsize=2)
    def layer_tensors(layer: int) -> dict[str, torch.Tensor]:
        from .assemble import repeat

        return repeat(LayerHeads(source.layers[layer], stored.read), target.layers[layer], order)

    with writing_folder(Path(output), marker=REPORT) as folder:
        write_checkpoint(folder, stored, {name: target.shapes[name] for name in owner},
                         lambda name: layer_tensors(owner[name])[name], fields, silent)
