"""Calls of the canonical op -> calls of the op for long prompts, in the layers of a plan, with tables and body.

The tables are small and lie in the graph itself. Dimensions as in `gqa_export.long_attention_op`.
"""

from __future__ import annotations

import numpy as np
import onnx

from .. import attention_op, graph_io, long_attention_op
from ..errors import UnsupportedModel
from ..long_attention_op import LongPlan
from .attention_function import is_call
from .context import Context
from .long_function import attach_long_function

PAST_KEY = attention_op.input_index("past_key")
SELECTION = "long.{}.selection"
"""the selection of a layer: an output of a call always, of the graph where `expose_selections` makes it one"""


def approximate(model: onnx.ModelProto, plan: LongPlan, context: Context) -> None:
    """Make the calls of the plan's layers calls of the op for long prompts, in place, and attach its body.

    Raises:
        UnsupportedModel: a layer of the plan has no call of the canonical op.
    """
    layers = {layer.layer: layer for layer in context.spec.layers if context.is_long(layer)}
    order = onnx.numpy_helper.from_array(np.array(long_attention_op.code_order(), np.int64), "long.code_order")
    made = [order]
    for node in model.graph.node:
        number = graph_io.layer_of_cache(node.input[PAST_KEY]) if is_call(node) else None
        layer = layers.pop(number, None) if number is not None else None
        if layer is None:
            continue
        tables: list[np.ndarray] = [np.array(long_attention_op.fractions(plan.seed, layer.layer, layer.kv_num_heads,
                                                       plan.setting.samples), np.int64),
                  np.array(long_attention_op.projections(plan.seed, layer.layer, layer.head_size), np.float32)]
        names = [f"long.{layer.layer}.{name}" for name in ("fractions", "projections")]
        made += [onnx.numpy_helper.from_array(table, name) for table, name in zip(tables, names)]
        node.name = node.name.replace(attention_op.OP, long_attention_op.OP)
        node.op_type = long_attention_op.OP
        node.output.append(SELECTION.format(layer.layer))
        node.input.extend([""] * (len(attention_op.INPUTS) - len(node.input)) + [*names, order.name])
        node.attribute.extend(onnx.helper.make_attribute(name, value)
                              for name, value in plan.setting.attributes().items())
    if layers:
        raise UnsupportedModel(f"{len(layers)} layers have no call of {attention_op.OP} to approximate",
                               f"layers {sorted(layers)}", "leave these layers out of --long-layers",
                               code="E-GRAPH-LONG")
    model.graph.initializer.extend(made)
    attach_long_function(model)


def expose_selections(model: onnx.ModelProto) -> list[str]:
    """Make the selection of every call of the op an output of the model, in place; the names of these outputs."""
    names = []
    for node in model.graph.node:
        if node.op_type == long_attention_op.OP and node.domain == long_attention_op.DOMAIN:
            name = node.output[long_attention_op.OUTPUT_NAMES.index("selection")]
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64,
                                                                         ["batch", None, None]))
            names.append(name)
    return names
