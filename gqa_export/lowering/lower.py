"""Lowering: the canonical model into the dialect of a target, by that target's list of passes.

A target is a row of `gqa_export.targets`, whose `dialect` is a module of this package. That module has `PREPARE`
(passes over an onnx_ir Model, weights detached and every value typed; None: not needed) and `PASSES` (passes over a
graphsurgeon Graph). """

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..spec import ModelSpec
from ..targets import Target, get_target
from .context import Context, Lowered, LowerOptions

if TYPE_CHECKING:
    import onnx


def lower(model: onnx.ModelProto, spec: ModelSpec, options: LowerOptions,
          progress: Callable[[str], None] | None = None) -> Lowered:
    """Lower the canonical `model`; it is not changed. `progress` is told the name of each stage.

    Raises GqaExportError for an unknown target, a layer the target can hold in no way, a pass that rewrote another
    number of places than it had to, and a result that is not sound.
    """
    from importlib import import_module

    from ..graph import edit
    from ..graph.check import check
    from ..graph.passes import run_passes
    from .prepare import prepare

    target = get_target(options.target)
    context = Context(spec, target, options, model)
    dialect = import_module(f".{target.dialect}", __package__)
    say = progress or (lambda stage: None)
    if dialect.PREPARE is not None:
        say("fusing")
        model = prepare(model, dialect.PREPARE, context)
    say("lowering")
    graph = edit.load(model)
    run_passes(graph, dialect.PASSES, context, context.counts)
    lowered = edit.save(graph)
    if hasattr(dialect, "finish"):
        lowered = dialect.finish(lowered, context)
    lowered.ir_version = target.ir_version
    inputs, outputs = interface(model, spec, target, options)
    check(lowered, inputs, outputs)
    return Lowered(lowered, tuple(context.fallbacks), context.counts, tuple(context.remarks))


def interface(model: onnx.ModelProto, spec: ModelSpec, target: Target, options: LowerOptions):
    """The input and output facts that a lowered model must have: those of `cache_io`, in the model's own float type."""
    import onnx

    from .. import graph_io

    element = next(value.type.tensor_type.elem_type for value in model.graph.output if value.name == graph_io.LOGITS)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element).name
    capacity = options.capacity if target.literal_capacity else graph_io.CAPACITY
    return (graph_io.graph_inputs(spec, dtype, options.cache, target.interface, capacity),
            graph_io.graph_outputs(spec, dtype, options.cache, options.logits, capacity))
