"""The stages in their order: checkpoint -> trace -> target -> weights -> bundle -> validation. No logic of its own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.manifest import MODEL, Manifest
from ..bundle.writer import check_output, writing_bundle
from ..weights.dtypes import itemsize
from ..errors import GqaExportError
from ..weights.memory_budget import Budget
from ..weights.layout import Mode, place
from ..weights.sources import WeightStore

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint
    from ..lowering.context import Lowered
    from ..targets import Target
    from ..trace.traced import Traced

Report = Callable[[str, float | None, float | None], None]
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DEFAULT_CAPACITY = 4096


@dataclass(frozen=True)
class ExportOptions:
    """What `gqa-export onnx` takes. dtype: "auto" is the checkpoint's. capacity 0: min(the model's, 4096).
    cache and logits "": the target's own. max_ram: bytes this process may occupy, 0 is no limit. text_only: of a
    multimodal model the language model alone."""

    target: str = "ort"
    dtype: str = "auto"
    cache: str = ""
    capacity: int = 0
    weights: Mode = "copy"
    logits: str = ""
    provider: str = "auto"
    force: bool = False
    hash_full: bool = False
    max_ram: int = 0
    text_only: bool = False


@dataclass(frozen=True)
class Export:
    """What an export did."""

    folder: Path
    manifest: Manifest
    nodes: int
    traced_layers: int
    whole_because: str
    trace_kept: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """Everything about an export that is known before a byte is written. Options are resolved."""

    checkpoint: Checkpoint
    options: ExportOptions
    dtype: str
    target: Target
    traced: Traced
    trace_kept: bool
    lowered: Lowered
    store: WeightStore


def export_onnx(source: str | Path, output: str | Path, options: ExportOptions | None = None,
                report: Report | None = None) -> Export:
    """Export a checkpoint into a new bundle folder. Raises GqaExportError; then nothing of it is left behind."""
    options, say = options or ExportOptions(), report or (lambda text, done, total: None)
    inplace = options.weights == "inplace"
    if not inplace:
        check_output(Path(os.path.abspath(output)), options.force)
    budget = Budget(options.max_ram)
    ready = prepare(source, options, say, budget, Path(output))
    checkpoint, traced, lowered, options = ready.checkpoint, ready.traced, ready.lowered, ready.options
    with writing_bundle(Path(output), force=options.force, inplace=inplace) as writer:
        say("placing weights", None, None)

        def written(done: int, total: int) -> None:
            budget.check("writing weights")
            say("writing weights", done, total)

        placement = place(lowered.model, ready.store, writer, options.weights, checkpoint.folder,
                          hash_full=options.hash_full, on_bytes=written)
        writer.write(MODEL, lowered.model.SerializeToString())
        has_tokenizer = checkpoint.has_tokenizer() if inplace else checkpoint.add_tokenizer(writer)
        notes: list[str] = []
        if not has_tokenizer:
            notes.append("the checkpoint has no tokenizer: the bundle takes and gives token ids only")
        manifest = _manifest(checkpoint, traced, lowered, options, ready.dtype, traced.capacity, has_tokenizer)
        if ready.target.genai:
            _add_genai(writer, manifest, pick_provider(options.provider, ready.dtype, ready.target), notes)
        manifest = writer.finish(_with_bytes(manifest, placement))
    if traced.rope_regime:
        notes.append(f"longrope: the {traced.rope_regime}-context frequencies are in the graph, as the capacity "
                     f"{traced.capacity} asks for")
    budget.check("exporting")
    return Export(Path(output), manifest, len(lowered.model.graph.node), traced.traced_layers, traced.whole_because,
                  ready.trace_kept, tuple(notes))


def prepare(source: str | Path, options: ExportOptions, say: Report, budget: Budget,
            output: Path | None = None) -> Prepared:
    """Open, trace and lower a checkpoint. output: None where nothing will be written."""
    from ..checkpoint.open import open_checkpoint
    from ..lowering.context import LowerOptions
    from ..targets import get_target
    from ..lowering.lower import lower

    target = get_target(options.target)
    options = replace(options, cache=options.cache or target.caches[0], logits=options.logits or target.logits[0])
    if options.cache not in target.caches:
        raise GqaExportError(f"target {target.name} has no {options.cache} cache", "--cache",
                             f"use --cache {target.caches[0]}")
    if options.logits not in target.logits:
        raise GqaExportError(f"target {target.name} does not give {options.logits} logits", "--logits",
                             f"use --logits {target.logits[0]}")
    say("reading the checkpoint", None, None)
    checkpoint = open_checkpoint(source, text_only=options.text_only)
    if options.weights == "inplace" and output is not None and output.resolve() != checkpoint.folder.resolve():
        raise GqaExportError("--weights inplace writes the graph into the checkpoint folder, and -o is another one",
                             str(output), f"use -o {checkpoint.folder}")
    if options.weights != "copy" and checkpoint.kind == "gguf":
        raise GqaExportError("a GGUF file's tensors are dequantized on the way, so they cannot be used where they are",
                             checkpoint.source, "use --weights copy")
    dtype = checkpoint.stored_dtype if options.dtype == "auto" else DTYPES[options.dtype]
    if dtype not in DTYPES.values():
        raise GqaExportError(f"weights of type {dtype} have no ONNX decoder", checkpoint.source,
                             "choose a type with --dtype fp32|fp16|bf16")
    traced, kept = traced_model(checkpoint, options, dtype, target, say)
    budget.check("tracing")
    lowering = LowerOptions(options.target, options.cache, traced.capacity, options.logits,
                            pick_provider(options.provider, dtype, target), packed=options.weights == "copy")
    lowered = lower(traced.model, traced.spec, lowering, lambda stage: say(stage, None, None))
    budget.check("lowering")
    return Prepared(checkpoint, options, dtype, target, traced, kept, lowered, weight_store(checkpoint, traced, budget))


def traced_model(checkpoint: Checkpoint, options: ExportOptions, dtype: str, target: Target,
                 say: Report) -> tuple[Traced, bool]:
    """The canonical model of a checkpoint, and whether it was kept from an earlier export (then PyTorch is not
    even imported: whatever its configuration could be refused for, it was not refused then)."""
    from ..trace import trace_cache

    asked = {"dtype": dtype, "cache": options.cache, "capacity": options.capacity, "logits": options.logits,
             "interface": target.interface, "text_only": options.text_only}
    place = trace_cache.place_of({"kind": checkpoint.kind, **checkpoint.config}, asked)
    known = trace_cache.load(place) if place else None
    if known:
        return known, True
    from ..checkpoint.refusals import refuse_modules
    from ..targets import refuse_layers
    from ..trace.tracing import trace

    say("tracing", None, None)
    config = checkpoint.load_config()
    traced = trace(config, dtype=dtype, cache=options.cache, capacity=_capacity(options.capacity, config),
                   logits=options.logits, interface=target.interface,
                   inspect=lambda module: refuse_modules(module, checkpoint.source, checkpoint.text_only),
                   accept=lambda spec: refuse_layers(spec.layers, target))
    if place:
        trace_cache.keep(place, traced)
    return traced, False


def _capacity(asked: int, config: Any) -> int:
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 0)
    longest = longest if longest > 0 else DEFAULT_CAPACITY  # XLNet's is -1
    if asked > longest:
        raise GqaExportError(f"capacity {asked} is beyond the model's {longest} positions", "--capacity",
                             f"use --capacity {longest} or less")
    return asked or min(longest, DEFAULT_CAPACITY)


def pick_provider(provider: str, dtype: str, target: Target) -> str:
    """"cpu" or "cuda"; "auto" is CUDA where onnxruntime has it and the target's kernels there take this dtype."""
    if provider != "auto":
        return provider
    from importlib.util import find_spec

    if dtype not in target.dtypes.get("cuda", ()) or find_spec("onnxruntime") is None:
        return "cpu"
    import onnxruntime

    return "cuda" if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "cpu"


def weight_store(checkpoint: Checkpoint, traced: Traced, budget: Budget) -> WeightStore:
    """Where every weight of a traced model is. The checkpoint is loaded only if names alone do not tell; then all
    that is not used as it is stored is held in memory, for which `budget` must have room."""
    from ..weights.sources import RECIPE, StoredSource, recipe_of

    wanted = {recipe_of(tensor).removeprefix(RECIPE): tuple(tensor.dims)
              for tensor in traced.model.graph.initializer if recipe_of(tensor)}
    stored = checkpoint.tensors
    aliases = {}
    ambiguous = False
    for group in traced.tied:
        there = [name for name in group if name in stored]
        ambiguous |= len(there) > 1
        aliases.update({name: there[0] for name in group if there and name not in stored})
    plain = not traced.converts and not ambiguous and all(
        (real := aliases.get(name, name)) in stored and stored[real].shape == shape for name, shape in wanted.items())
    if plain:
        return WeightStore({name: StoredSource(tensor) for name, tensor in stored.items()}, aliases)
    elements = sum(math.prod(shape) for shape in wanted.values())
    budget.need(elements * itemsize(checkpoint.stored_dtype), "loading the model (its tensors are merged or "
                "dequantized, so they cannot be streamed)")
    return WeightStore.from_module(checkpoint, checkpoint.load_model("auto"))


def _manifest(checkpoint: Checkpoint, traced: Traced, lowered: Any, options: ExportOptions, dtype: str, capacity: int,
              has_tokenizer: bool) -> Manifest:
    from .. import graph_io
    from ..targets import get_target

    target = get_target(options.target)
    axis = capacity if target.literal_capacity else graph_io.CAPACITY
    return Manifest(
        target=options.target, dtype=dtype, cache=options.cache, capacity=capacity, logits=options.logits,
        weights=options.weights, spec=traced.spec,
        inputs=graph_io.graph_inputs(traced.spec, dtype, options.cache, target.interface, axis),
        outputs=graph_io.graph_outputs(traced.spec, dtype, options.cache, options.logits, axis),
        fallbacks=lowered.fallbacks,
        source={"checkpoint": checkpoint.source, "kind": checkpoint.kind, "dtype": checkpoint.stored_dtype,
                "rope_regime": traced.rope_regime, "traced_layers": traced.traced_layers,
                "text_only": checkpoint.text_only},
        tokens={**checkpoint.token_ids(), "tokenizer": has_tokenizer}, versions=_versions())


def _with_bytes(manifest: Manifest, placement: Any) -> Manifest:
    return replace(manifest, bytes_copied=placement.bytes_copied, bytes_linked=placement.bytes_linked)


def _add_genai(writer: Any, manifest: Manifest, provider: str, notes: list[str]) -> None:
    import json

    from . import genai_config

    reason = genai_config.misfit(manifest)
    if reason:
        notes.append(f"no {genai.FILE}: {reason}")
        return
    config = genai_config.genai_config(manifest, provider)
    writer.write(genai_config.FILE, (json.dumps(config, indent=1) + "\n").encode())


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("gqa-export", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnx-graphsurgeon"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
