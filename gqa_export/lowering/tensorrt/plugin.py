"""Target `trt-plugin`: every attention layer one node of the grouped-attention plugin of TensorRT and TensorRT-RTX.

The node has the inputs that are present, in the order of the contract, and no holes among them, which TensorRT
refuses; `has_new`, `has_rotary` and `has_sinks` say which those are. Rotary goes into the op where it is one that
the op can do. The rest of the graph stays standard ops as traced: TensorRT fuses those itself.

Where the cache holds codes, every node is of version 3 of the plugin: it has the attributes of version 2 of the op, and
its cache tensors are of the codes' type.

In the graph for long prompts every node is of version 2 of the plugin: the layers of the plan have the attributes and
the tables of `gqa::LongGroupedQueryAttention`, the others have `method` 0, which is exact.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ... import attention_op, graph_io, long_attention_op
from ...bundle.long_facts import LONG_PLUGIN_VERSION
from ...graph.match import is_op
from ...graph.passes import NearMiss, Pass, Rewritten
from ...long_attention_op import LongPlan
from ...spec import AttentionSpec, KvCache
from .. import head_axes
from ..attention_calls import attention_calls, has_sinks
from ..context import Context
from ..kv_codes import retype, scales_of
from ..rotary.fold import fold_rotary, tables
from .common import FIRST, PREPARE  # noqa: F401 PREPARE is this target's too

PLUGIN_VERSION = str(attention_op.VERSION)
PLUGIN_NAMESPACE = attention_op.DOMAIN
PRESENCE = {"has_new": "key", "has_rotary": "cos", "has_sinks": "sinks"}
"""int attributes of the node: whether that input (and its pair) is among its inputs"""
TABLES = {"fractions": np.int32, "projections": np.float32, "code_order": np.int32}
"""inputs of a node with a method, after the others, in the order of the contract"""


def lower_attention(graph: gs.Graph, context: Context) -> Rewritten:
    """Drop the inputs without effect, give each call its rotary tables and what TensorRT finds the plugin by."""
    known: dict[bytes, tuple[gs.Tensor, gs.Tensor]] = {}
    shared: dict[str, gs.Tensor] = {}
    calls, misses = attention_calls(graph, context)
    presents: dict[int, list[gs.Tensor]] = {}
    for node, layer in calls:
        rotation = context.rotations.get(layer.layer)
        inputs: dict[str, gs.Tensor | None] = dict(zip(attention_op.INPUT_NAMES, node.inputs))
        cos, sin = tables(graph, rotation, context.element, known) if rotation else (None, None)
        inputs.update(cos=cos, sin=sin)
        if layer.owner is None:
            presents[layer.layer] = list(node.outputs[1:])
        else:
            # Without new keys the node would have one output, which is not in place: TensorRT for RTX 1.7 then compiles
            # it into a region of its own, which carries the kernels once more. So it writes what its owner wrote.
            inputs.update(past_key=presents[layer.owner][0], past_value=presents[layer.owner][1])
        if has_sinks(node) is False:
            inputs["sinks"] = None
        there = {name: inputs.get(name) for name in attention_op.INPUT_NAMES}
        there = {name: tensor for name, tensor in there.items() if tensor is not None and not tensor.is_empty()}
        node.inputs = list(there.values())
        node.attrs["rotary_interleaved"] = int(rotation is not None and rotation.interleaved)
        node.attrs.update({flag: int(name in there) for flag, name in PRESENCE.items()})
        node.attrs.update(plugin_version=PLUGIN_VERSION, plugin_namespace=PLUGIN_NAMESPACE)
        if context.options.kv is not None:
            _hold_codes(node, layer, context.options.kv)
        if context.options.long is not None:
            _approximate(node, layer, context.options.long if context.is_long(layer) else None, shared)
    return Rewritten(len(calls), misses)


def _hold_codes(node: gs.Node, layer: AttentionSpec, kv: KvCache) -> None:
    """Make a node one of version 3: with the type of its codes and their scales."""
    first = [tensor.name for tensor in node.inputs].index(graph_io.past_names(layer.layer)[0])
    retype(kv, layer, node.inputs[first: first + 2], node.outputs[1:])
    scales = scales_of(kv, layer.layer)
    node.attrs.update(cache_codes=attention_op.CACHE_CODES[kv.kind], key_scale=float(np.float32(scales.key)),
                      value_scale=float(np.float32(scales.value)), plugin_version=attention_op.CODES_PLUGIN_VERSION)


def _approximate(node: gs.Node, layer: AttentionSpec, plan: LongPlan | None, known: dict[str, gs.Tensor]) -> None:
    """Make a node one of version 2: with the attributes and tables of a plan, or, without one, exact."""
    own = plan.setting.attributes() if plan else dict.fromkeys(long_attention_op.OWN_ATTRIBUTES, 0)
    node.attrs.update(own, plugin_version=LONG_PLUGIN_VERSION)
    if plan is None:
        return
    if "code_order" not in known:
        known["code_order"] = gs.Constant("long.code_order", np.array(long_attention_op.code_order(), np.int32))
    tables = {"fractions": long_attention_op.fractions(plan.seed, layer.layer, layer.kv_num_heads,
                                                       plan.setting.samples),
              "projections": long_attention_op.projections(plan.seed, layer.layer, layer.head_size)}
    node.inputs = [*node.inputs, *(gs.Constant(f"long.{layer.layer}.{name}", np.array(table, TABLES[name]))
                                   for name, table in tables.items()), known["code_order"]]


def no_holes(graph: gs.Graph, context: Context) -> list[NearMiss]:
    """The plugin nodes among whose inputs one is left out, which TensorRT refuses: there must be none."""
    return [NearMiss(node.name, "one of its inputs is left out") for node in graph.nodes
            if is_op(node, attention_op.OP, attention_op.DOMAIN) and any(each.is_empty() for each in node.inputs)]


PASSES = [
    *FIRST,
    Pass("rotary_inside", fold_rotary, requires=("refuse_layers",)),
    Pass("unreshape", head_axes.unreshape, requires=("rotary_inside",)),
    Pass("lower_attention", lower_attention, requires=("rotary_inside",), ensures=no_holes,
         expect=lambda context: len(context.spec.layers)),
]
