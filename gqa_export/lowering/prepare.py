"""The canonical model as passes want it: every value typed; then onnxscript's rules over an onnx_ir Model.

Weights are graph inputs meanwhile, so that no rule can read or fold one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import onnx

from .. import attention_op, graph_io
from ..graph.passes import Pass, run_passes
from .context import Context

logger = logging.getLogger(__name__)


def infer_shapes(model: onnx.ModelProto, context: Context) -> int:
    """Give every value its type and shape, which the rules ask for; counts the attention outputs typed by contract."""
    pasts = {graph_io.past_names(layer.layer)[0]: layer for layer in context.spec.layers}
    elements = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    known = {value.name: value for value in model.graph.value_info}
    place, count = attention_op.input_index("past_key"), 0
    for node in model.graph.node:
        if node.op_type != attention_op.OP or node.domain != attention_op.DOMAIN or node.input[place] not in pasts:
            continue
        layer = pasts[node.input[place]]
        shape: list[str | int | None] = [graph_io.BATCH, graph_io.SEQUENCE, layer.num_heads * layer.value_head_size]
        typed = onnx.helper.make_tensor_value_info(node.output[0], elements[node.input[place]], shape)
        (known.get(node.output[0]) or model.graph.value_info.add()).CopyFrom(typed)
        count += 1
    try:
        model.CopyFrom(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True))
    except Exception as reason:  # then nothing is fused: slower, equally right
        logger.warning("types and shapes could not be inferred: %s", reason)
    return count


INFER = Pass("infer_shapes", infer_shapes, expect=lambda context: len(context.spec.layers))


def prepare(model: onnx.ModelProto, passes: Sequence[Pass], context: Context) -> onnx.ModelProto:
    """A copy of `model`, typed, after `passes` over it as an onnx_ir Model. Weights stay recipes; the order of real
    inputs is kept."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = [t for t in copy.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inline = [t for t in copy.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(inline)
    inputs = len(copy.graph.input)
    for tensor in weights:
        copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    run_passes(copy, [INFER], context, context.counts)
    if passes:
        from onnx_ir import serde

        graph = serde.deserialize_model(copy)
        run_passes(graph, passes, context, context.counts)
        copy = serde.serialize_model(graph)
    del copy.graph.input[inputs:]
    read = {name for node in copy.graph.node for name in node.input}
    copy.graph.initializer.extend(tensor for tensor in weights if tensor.name in read)
    return copy
