"""`--lora` and `--merge-lora`: adapters that a bundle can switch between, and one that becomes part of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.lora import check_modules, merged, read_adapter, refuse_tied_head
from ..checkpoint.lora_adapter import LoraAdapter, LoraModule
from ..errors import GqaExportError
from ..files.scratch import scratch_folder
from ..lowering.adapter_inputs import FIRST, SECOND, AdapterSlot, add_adapter_inputs
from ..runtime.ort.adapters import SUFFIX, write_adapter
from ..weights.dtypes import numpy_dtype
from ..weights.source_kinds import MemorySource, Source, StoredSource
from ..weights.sources import WeightStore
from .options import ExportOptions

if TYPE_CHECKING:
    from ..bundle.writer import BundleWriter
    from ..lowering.context import Lowered
    from ..targets import Target
    from ..trace.traced import Traced


def read_adapters(options: ExportOptions, target: Target) -> tuple[tuple[LoraAdapter, ...], LoraAdapter | None]:
    """The adapters of an export: those to switch between, and the one to merge.

    Raises:
        GqaExportError: both are given, or two of one name, or the target cannot switch.
    """
    if options.lora and options.merge_lora:
        raise GqaExportError("an adapter is either merged or switchable, and both options are given",
                             "--lora, --merge-lora", "merge one, and export again for others", code="E-OPTION-LORA")
    if options.lora and not target.runs_in_onnxruntime:
        raise GqaExportError(f"bundles of target {target.name} cannot switch between adapters", "--lora",
                             "use --merge-lora, or --target ort, onnx or portable", code="E-TARGET-LORA")
    if options.lora and options.long:
        raise GqaExportError("the graph for long prompts has no adapters", "--lora, --long-attention",
                             "leave out one, or use --merge-lora", code="E-OPTION-LORA")
    adapters = tuple(read_adapter(folder) for folder in options.lora)
    names = [adapter.name for adapter in adapters]
    if twice := [name for name in names if names.count(name) > 1]:
        raise GqaExportError(f"two adapters have the name {twice[0]}", "--lora",
                             "rename a folder: an adapter is named after its folder", code="E-OPTION-LORA-NAME")
    return adapters, read_adapter(options.merge_lora) if options.merge_lora else None


def refuse_quantized_adapters(quantized: bool) -> None:
    """Refuse adapters for a checkpoint that is stored quantized: PyTorch, which they are compared with, holds its
    weights in layers of another kind, and an adapter trained on those is one of other weights than they stand for.

    Raises:
        GqaExportError: the checkpoint is quantized.
    """
    if quantized:
        raise GqaExportError("adapters are neither merged into a checkpoint that is stored quantized nor added beside "
                             "its weights", "--lora, --merge-lora", "export the unquantized checkpoint, with "
                             "--quantize int4 or int8 if the bundle shall be quantized", code="E-OPTION-LORA-QUANTIZED")


def weight_shapes(traced: Traced, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shape of every weight by all of its names. wanted: by the names that the graph uses."""
    shapes = dict(wanted)
    for group in traced.tied:
        known = next((shapes[name] for name in group if name in shapes), None)
        if known is not None:
            shapes.update(dict.fromkeys(group, known))
    return shapes


def add_slots(lowered: Lowered, traced: Traced, adapters: Sequence[LoraAdapter],
              shapes: Mapping[str, tuple[int, ...]]) -> tuple[Lowered, tuple[AdapterSlot, ...]]:
    """A lowered graph with an input for every module that one of the adapters changes, and those places."""
    import onnx

    for adapter in adapters:
        check_modules(adapter, shapes)
    model = onnx.ModelProto()
    model.CopyFrom(lowered.model)
    modules = {name for adapter in adapters for name in adapter.modules}
    slots = add_adapter_inputs(model, modules, shapes, traced.tied)
    return replace(lowered, model=model), tuple(slots)


def write_adapters(writer: BundleWriter, adapters: Sequence[LoraAdapter], slots: Sequence[AdapterSlot],
                   dtype: str) -> None:
    """Write NAME.onnx_adapter for every adapter, in the bundle's number format."""
    for adapter in adapters:
        with scratch_folder("adapter") as place:
            path = place / f"{adapter.name}{SUFFIX}"
            write_adapter(path, adapter_parameters(adapter, slots, dtype))
            writer.write(path.name, path.read_bytes())


def adapter_parameters(adapter: LoraAdapter, slots: Sequence[AdapterSlot], dtype: str) -> dict[str, np.ndarray]:
    """An adapter's factors as the graph's inputs take them: A [in, rank] and scale * B [rank, out]."""
    kind = numpy_dtype(dtype)
    found: dict[str, np.ndarray] = {}
    for slot in slots:
        here = [adapter.modules[name].factors() for name, _ in slot.parts if name in adapter.modules]
        if not here:
            continue
        ranks, rows = [first.shape[0] for first, _ in here], sum(size for _, size in slot.parts)
        second = np.zeros((sum(ranks), rows), np.float32)
        rank = column = 0
        for name, size in slot.parts:
            if name in adapter.modules:
                factor = adapter.modules[name].factors()[1]
                second[rank: rank + factor.shape[1], column: column + size] = factor.T
                rank += factor.shape[1]
            column += size
        first = np.concatenate([first for first, _ in here]).T
        found[slot.name + FIRST] = np.ascontiguousarray(first).astype(kind)
        found[slot.name + SECOND] = second.astype(kind)
    return found


def merge_weights(store: WeightStore, adapter: LoraAdapter, traced: Traced,
                  shapes: Mapping[str, tuple[int, ...]]) -> WeightStore:
    """The same weights, those that the adapter changes computed on the way, one at a time."""
    check_modules(adapter, shapes)
    refuse_tied_head(adapter, traced.tied)
    sources: dict[str, Source] = dict(store.sources)
    for name, module in adapter.modules.items():
        source = sources[f"{name}.weight"]
        if isinstance(source, StoredSource):  # of a loaded model they are merged already
            sources[f"{name}.weight"] = MemorySource(partial(_merged, source, module), "float32", source.shape)
    return WeightStore(sources)


def _merged(source: StoredSource, module: LoraModule) -> np.ndarray:
    data: Any = b"".join(bytes(chunk) for chunk in source.chunks())
    assert len(data) == math.prod(source.shape) * numpy_dtype(source.dtype).itemsize
    return merged(module, np.frombuffer(data, numpy_dtype(source.dtype)).reshape(source.shape))


def adapter_facts(options: ExportOptions, adapters: Sequence[LoraAdapter]) -> dict[str, object]:
    """What a manifest says of adapters; nothing where there are none."""
    facts: dict[str, object] = {}
    if adapters:
        facts["adapters"] = [adapter.name for adapter in adapters]
    if options.merge_lora:
        facts["merged_lora"] = str(Path(options.merge_lora))
    return facts
