"""Lowering: the canonical model into the dialect of a target, by that target's list of passes.

A target is a row of `gqa_export.targets`, whose `dialect` is a module of this package. That module has `PREPARE`
(passes over an onnx_ir Model, weights detached and every value typed; None: not needed) and `PASSES` (passes over a
graphsurgeon Graph).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from ..spec import ModelSpec
from ..targets import Target, get_target
from .context import Context, Lowered, LowerOptions

if TYPE_CHECKING:
    import onnx

    from ..graph_io import TensorFact
    from .dump import PassDump

IR_VERSION = {23: 11}
"""element type -> the first IR version that has it, where it is not old (float4e2m1)"""


def lower(model: onnx.ModelProto, spec: ModelSpec, options: LowerOptions,
          progress: Callable[[str], None] | None = None, dump: PassDump | None = None) -> Lowered:
    """Lower a canonical model.

    Args:
        model: as traced, weights still recipes. It is not changed.
        spec: of that model.
        options: the target and its settings.
        progress: called with the name of each stage.
        dump: writes the graph after each pass; None writes nothing.

    Raises:
        GqaExportError: the target is unknown.
        UnsupportedModel: the target cannot hold a layer, an attention node disagrees with its layer, a pass rewrote
            another number of places than it has to, or the result is not sound.
    """
    from ..graph import edit
    from ..graph.check import check
    from ..graph.passes import run_passes
    from .opset import settle_opset
    from .prepare import prepare

    target = get_target(options.target)
    context = Context(spec, target, options, model)
    dialect = import_module(f".{target.dialect}", __package__)
    say = progress or (lambda stage: None)
    if dump is not None:
        dump.start(model)
        context.log.watch = dump.add
    if dialect.PREPARE is not None:
        say("fusing")
        model = prepare(model, dialect.PREPARE, context)
    say("lowering")
    graph = edit.load(model)
    if options.windows is not None:
        run_passes(graph, import_module(".window_cache", __package__).PASSES, context, context.log)
    run_passes(graph, dialect.PASSES, context, context.log)
    if options.kv is not None and not target.engine:  # where they are within the target's own nodes
        run_passes(graph, import_module(".kv_codes", __package__).PASSES, context, context.log)
    if options.quantized:
        run_passes(graph, import_module(".quantized.passes", __package__).PASSES, context, context.log)
    lowered = edit.save(graph)
    if options.long is not None and not target.long_inside:
        from .long_calls import approximate

        approximate(lowered, options.long, context)
    if hasattr(dialect, "finish"):
        lowered = dialect.finish(lowered, context)
    lowered.ir_version = max(target.ir_version, *(IR_VERSION.get(tensor.data_type, 0)
                                                  for tensor in lowered.graph.initializer), 0)
    if target.lowest_opset:
        settle_opset(lowered)
    inputs, outputs = interface(model, spec, target, options)
    check(lowered, inputs, outputs)
    return context.result(lowered)


def interface(model: onnx.ModelProto, spec: ModelSpec, target: Target,
              options: LowerOptions) -> tuple[tuple[TensorFact, ...], tuple[TensorFact, ...]]:
    """The inputs and outputs that a lowered model must have: those of `graph_io`, in the model's own float type."""
    import onnx

    from .. import graph_io

    element = next(value.type.tensor_type.elem_type for value in model.graph.output if value.name == graph_io.LOGITS)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element).name
    capacity = options.capacity if target.literal_capacity else graph_io.CAPACITY
    return (graph_io.graph_inputs(spec, dtype, options.cache, target.interface, capacity, options.kv,
                                  options.windows),
            graph_io.graph_outputs(spec, dtype, options.cache, options.logits, capacity, options.kv, options.hidden,
                                   options.windows))
