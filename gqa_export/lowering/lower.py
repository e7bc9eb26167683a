"""Lowering: the canonical model into the dialect of a target, by that target's list of passes.

The folder is the registry: target `x-y` is the row `x-y` of `table.py` and the module `x_y.py`, which has `PREPARE`
(passes over an onnx_ir Model, weights detached and every value typed; None: not asked for) and `PASSES` (passes over
a graphsurgeon Graph).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..spec import Fallback
from ..spec import AttentionSpec, ModelSpec
from ..targets import TARGETS, Target, get_target

if TYPE_CHECKING:
    import onnx

__all__ = ["TARGETS", "Context", "LowerOptions", "Lowered", "Target", "get_target", "lower"]


@dataclass(frozen=True)
class LowerOptions:
    """What the caller asks for. capacity: tokens of a static cache, and rows of rotary tables in both modes.
    logits: "all" or "last". packed: weights are copied, so matrices may be joined (False: used as stored)."""

    target: str
    cache: str = "growing"
    capacity: int = 4096
    logits: str = "all"
    provider: str = "cpu"
    packed: bool = True


@dataclass(frozen=True)
class Lowered:
    """The model in its dialect, weights still recipes; layers that fell back; the count of each pass; remarks, one
    line each, on what is right but not as fast as it could be."""

    model: onnx.ModelProto
    fallbacks: tuple[Fallback, ...]
    counts: dict[str, int]
    remarks: tuple[str, ...] = ()


@dataclass
class Context:
    """What the passes share. `notes` is for passes of one target among themselves; `lower` adds `model`, the
    canonical ModelProto."""

    spec: ModelSpec
    target: Target
    options: LowerOptions
    fallbacks: list[Fallback] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def layer(self, number: int) -> AttentionSpec:
        """The spec of layer `number`."""
        return next(layer for layer in self.spec.layers if layer.layer == number)

    def fall_back(self, layer: int, reason: str) -> None:
        """Record that `layer` does not become the target's attention op."""
        self.fallbacks.append(Fallback(layer, self.target.attention, self.target.fallback, reason))


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
    context = Context(spec, target, options, notes={"model": model})
    dialect = import_module(f".{options.target.replace('-', '_')}", __package__)
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
