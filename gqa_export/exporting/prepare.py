"""Everything about an export that is known before a byte is written: opened, traced, lowered, weights found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.load_config import load_config
from ..checkpoint.lora import with_adapter
from ..checkpoint.open import open_checkpoint
from ..checkpoint.tied_weights import refuse_tied, stored_apart, untie
from ..checkpoint.tokenizer import token_ids
from ..checkpoint.unused_tensors import unused_notes
from ..environment.onnxruntime_ops import state_ops_of_runtime
from ..errors import GqaExportError, UnsupportedModel
from ..files.scratch import scratch_folder
from ..progress import Progress
from ..spec import DEFAULT_CAPACITY, DTYPES, ModelSpec
from ..weights.memory_budget import Budget
from . import quantize
from .adapters import add_slots, merge_weights, read_adapters, refuse_quantized_adapters, weight_shapes
from .fit_bits import divergence_of, fitted
from .input_scales import SAME, input_notes, with_inputs
from .kv_calibration import cache_of
from .long_plan import long_plan, plan_notes
from .options import ExportOptions
from .prepared import Prepared, pick_provider
from .ranks import lower_ranks, refuse_quantized_ranks, refuse_ranks
from .shared_caches import first_version, reads_caches, refuse_long_with_shared
from .tokenizer_files import check_tokenizer
from .weight_store import used_names, wanted_weights, weight_store
from .window_plan import check_window_options, window_plan

if TYPE_CHECKING:
    from ..long_attention_op import LongSetting
    from ..lowering.adapter_inputs import AdapterSlot
    from ..targets import Target
    from ..trace.traced import Traced
    from .weight_plan import Plan


def prepare(source: str | Path | Checkpoint, options: ExportOptions, say: Progress, budget: Budget,
            output: Path | None = None, opened: Callable[[Checkpoint, str], None] | None = None) -> Prepared:
    """Open, trace and lower a checkpoint. output: None where nothing will be written. opened: called with the
    checkpoint, and its type in the graph, before it is traced."""
    from ..lowering.context import LowerOptions
    from ..lowering.dump import PassDump
    from ..lowering.lower import lower
    from ..target_refusals import (
        refuse_long,
        refuse_long_with_codes,
        refuse_long_with_rounding,
        refuse_options,
        refuse_ragged_chunks,
        refuse_ragged_states,
    )
    from ..targets import get_target

    target = get_target(options.target)
    default = "static" if options.window_cache == "small" else target.caches[0]
    options = replace(options, cache=options.cache or default, logits=options.logits or target.logits[0])
    refuse_options(target, options.cache, options.logits)
    check_window_options(options, target)
    refuse_ragged_chunks(target, options.ragged_chunks, bool(options.long))
    quantize.check_options(options, target)
    refuse_ranks(options, target)
    if options.long:
        refuse_long(target)
        refuse_long_with_codes(options.kv_cache)
        if options.activations == SAME:
            refuse_long_with_rounding()
    adapters, merge = read_adapters(options, target)
    dump = PassDump(options.dump_passes, force=options.force) if options.dump_passes else None
    say("reading the checkpoint", None, None)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(
        source, text_only=options.text_only, revision=options.revision)
    checkpoint = checkpoint if merge is None else with_adapter(checkpoint, merge)
    check_tokenizer(checkpoint)
    token_ids(checkpoint)  # refuses damaged files beside the weights before the work
    if options.weights == "inplace" and output is not None and output.resolve() != checkpoint.folder.resolve():
        raise GqaExportError("--weights inplace writes the graph into the checkpoint folder, but -o names another one",
                             str(output), f"use -o {checkpoint.folder}", code="E-OPTION-INPLACE")
    if options.weights != "copy" and checkpoint.kind == "gguf":
        raise GqaExportError("a GGUF file's tensors are rearranged on the way, so they cannot be used where they are",
                             checkpoint.source, "use --weights copy", code="E-OPTION-GGUF-WEIGHTS")
    if options.weights != "copy" and checkpoint.model is not None:
        raise GqaExportError("the weights of a model in memory are not in a file that a graph could point into",
                             checkpoint.source, 'use weights="copy"', code="E-OPTION-WEIGHTS")
    dtype = checkpoint.stored_dtype if options.dtype == "auto" else DTYPES[options.dtype]
    if dtype not in DTYPES.values():
        raise UnsupportedModel(f"decoders are not exported with weights of type {dtype}", checkpoint.source,
                               "choose a type with --dtype fp32|fp16|bf16", code="E-MODEL-DTYPE")
    if opened is not None:
        opened(checkpoint, dtype)
    traced, kept, taken = traced_model(checkpoint, options, dtype, target, say)
    if any(stored_apart(checkpoint, group) for group in traced.tied):
        traced, kept, taken = traced_model(checkpoint, options, dtype, target, say, untied=True)
        refuse_tied(checkpoint, traced.tied)
    budget.check("tracing")
    refuse_ragged_states(traced.spec.states, options.ragged_chunks)
    notes = unused_notes(checkpoint, used_names(traced), options.ignore_unused)
    provider = pick_provider(options.provider, dtype, target)
    store = weight_store(checkpoint, traced, budget)
    if merge is not None:
        store = merge_weights(store, merge, traced, weight_shapes(traced, wanted_weights(traced)))
    quantizing = with_inputs(quantize.plan(checkpoint, traced, store, options, target, provider, say), options, target,
                             dtype, checkpoint.source)
    if adapters or merge is not None:
        refuse_quantized_adapters(bool(checkpoint.quantized))
    kv = cache_of(checkpoint, traced, options, target, say)
    reads = reads_caches(traced.spec, target, options.ragged_chunks)
    rings = window_plan(options, target, traced.spec, traced.capacity)
    plan = None
    if options.long:
        if quantizing is not None and not quantizing.exact:
            refuse_long_with_rounding()
        refuse_long_with_shared(traced.spec)
        plan = long_plan(options.long, traced.spec, traced.capacity,
                         lambda setting: automatic_layers(checkpoint, options, traced.spec, setting, say),
                         inside=target.long_inside)
        notes = (*notes, *plan_notes(plan, traced.spec, target.long_inside))
    lowering = LowerOptions(options.target, options.cache, traced.capacity, options.logits, provider, kv=kv,
                            windows=rings.windows, hidden=options.hidden_states, ragged_chunks=options.ragged_chunks,
                            reads_caches=reads, packed=options.weights == "copy",
                            runtime_ops=state_ops_of_runtime(provider) if traced.spec.states else None)
    if options.tensor_parallel > 1:
        refuse_quantized_ranks(checkpoint.source, options.quantize != "dequantize" and (
            quantizing is not None or bool(checkpoint.quantized)))

    def lowered_with(quantizing: Plan | None, dump: PassDump | None = None) -> Prepared:
        """All that depends on what becomes of each weight."""
        own = replace(lowering, quantized=quantizing.facts if quantizing else {},
                      exact=quantizing is not None and quantizing.exact,
                      inputs=quantizing.inputs if quantizing else {})
        ranks = None
        if options.tensor_parallel > 1:
            ranks = lower_ranks(traced, own, options.tensor_parallel, tensor_parallel_plan(checkpoint),
                                lambda stage: say(stage, None, None))
            lowered = ranks.lowered[0]
        else:
            lowered = lower(traced.model, traced.spec, own, lambda stage: say(stage, None, None), dump)
            lowered = replace(lowered, fallbacks=(*lowered.fallbacks, *rings.fallbacks))
        slots: tuple[AdapterSlot, ...] = ()
        if adapters:
            lowered, slots = add_slots(lowered, traced, adapters, weight_shapes(traced, wanted_weights(traced)))
        prefill = lower(traced.model, traced.spec, replace(own, long=plan),
                        lambda stage: say(f"{stage} the graph for long prompts", None, None)) if plan else None
        budget.check("lowering")
        recorded = None
        if quantizing:
            for each in (lowered, *((prefill,) if prefill else ())):
                quantize.fill(quantizing, each, store, checkpoint.packed if options.weights != "copy" else None)
            recorded = quantize.record(quantizing, lowered, dtype)
        return Prepared(checkpoint, options, dtype, target, traced, kept, taken, lowered, store, adapters, slots,
                        (*checkpoint.notes, *notes, *rings.notes, *(quantizing.notes if quantizing else ()),
                         *input_notes(quantizing, lowered.held)), recorded,
                        ranks, kv, plan, prefill, quantizing.importance if quantizing else {}, rings.windows,
                        first_version(traced.spec, target, reads),
                        quantizing.largest if quantizing and quantizing.same else {})

    if quantizing is None or not options.limited:
        return lowered_with(quantizing, dump)
    with scratch_folder("predictions") as scratch:
        return fitted(lowered_with(quantizing), quantizing, lowered_with,
                      lambda: divergence_of(checkpoint, quantizing, scratch), say, dump)


def tensor_parallel_plan(checkpoint: Checkpoint) -> dict[str, str]:
    """transformers' own plan for this model, by names of modules; {} where it has none."""
    plan = getattr(load_config(checkpoint).get_text_config(), "base_model_tp_plan", None)
    return dict(plan or {})


def automatic_layers(checkpoint: Checkpoint, options: ExportOptions, spec: ModelSpec, setting: LongSetting,
                     say: Progress) -> tuple[int, ...]:
    """Layers chosen by measurement on the options' text.

    Raises:
        GqaExportError: there is no text, or no layer can be approximated within the bounds.
    """
    from ..long_context.choose import choose_layers

    assert options.long is not None
    if options.long.text is None:
        raise GqaExportError("layers are chosen by measurement, and a text to measure on is missing",
                             "--long-layers auto", "give a text file with --text FILE, or name the layers",
                             code="E-OPTION-LONG")
    return choose_layers(checkpoint, options.long.text, spec, setting, options.long.seed,
                         max_loss=options.long.max_loss, min_copy=options.long.min_copy, report=say).layers


def traced_model(checkpoint: Checkpoint, options: ExportOptions, dtype: str, target: Target,
                 say: Progress, untied: bool = False) -> tuple[Traced, Path | None, bool]:
    """The canonical model of a checkpoint, the file in which it is kept (None: it is not), and whether an earlier
    export kept it there (then PyTorch is not even imported: whatever its configuration could be refused for, it was
    not refused then). untied: with a head of its own, whatever its configuration says."""
    from ..trace import trace_cache

    asked = {"dtype": dtype, "cache": options.cache, "capacity": options.capacity, "logits": options.logits,
             "interface": target.interface, "text_only": options.text_only, **({"untied": True} if untied else {}),
             **({"hidden": True} if options.hidden_states else {})}
    place = trace_cache.place_of({"kind": checkpoint.kind, **checkpoint.config}, asked) if options.trace_cache else None
    known = trace_cache.load(place) if place else None
    if known and (options.stamping or known.traced_layers == len(known.spec.layers)):
        return known, place, True
    from ..checkpoint.refusals import refuse_modules
    from ..target_refusals import refuse_layers
    from ..trace.tracing import trace

    say("tracing", None, None)
    config = load_config(checkpoint)
    if untied:
        untie(config)
    traced = trace(config, dtype=dtype, cache=options.cache, capacity=_capacity(options.capacity, config),
                   logits=options.logits, interface=target.interface, stamping=options.stamping,
                   inspect=lambda module: refuse_modules(module, checkpoint.source, checkpoint.text_only),
                   accept=lambda spec: refuse_layers(spec.layers, target, spec.states), hidden=options.hidden_states)
    if place:
        trace_cache.keep(place, traced)
    return traced, place, False


def _capacity(asked: int, config: Any) -> int:
    from ..trace.probe import rotary

    text = config.get_text_config()
    longest = rotary.longest(text) or DEFAULT_CAPACITY
    if asked > longest:
        rotary.check_dynamic(text, asked)
        raise GqaExportError(f"capacity {asked} is beyond the model's {longest} positions", "--capacity",
                             f"use --capacity {longest} or less", code="E-OPTION-CAPACITY")
    return asked or min(longest, DEFAULT_CAPACITY)
