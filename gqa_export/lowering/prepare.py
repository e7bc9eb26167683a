"""The canonical model as passes want it: every value typed; then onnxscript's rules over an onnx_ir Model.

Weights are graph inputs meanwhile, so that no rule can read or fold one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx

from .. import attention_op, graph_io
from ..errors import cause_of
from ..graph.passes import NearMiss, Pass, Rewritten, run_passes
from ..state_ops import CAUSAL_CONV
from .context import Context
from .state_functions import op_of

if TYPE_CHECKING:
    import onnx_ir

logger = logging.getLogger(__name__)


def infer_shapes(model: onnx.ModelProto, context: Context) -> Rewritten:
    """Give every value its type and shape, which the rules need; counts the outputs typed by contract: those of
    attention and of the state ops."""
    readers = graph_io.CacheReaders(context.spec)
    pasts = {graph_io.past_names(layer.layer)[0] for layer in context.spec.owners}
    elements = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    known = {value.name: value for value in model.graph.value_info}
    place, count, misses = attention_op.input_index("past_key"), 0, []
    for node in model.graph.node:
        past = node.input[place] if len(node.input) > place else ""
        if node.op_type != attention_op.OP or node.domain != attention_op.DOMAIN:
            if any(name in pasts for name in node.input):
                misses.append(NearMiss(node.name, f"it reads a cache and is {node.op_type}, "
                                       f"expected {attention_op.OP}"))
            continue
        layer = readers.take(past)
        if layer is None:
            misses.append(NearMiss(node.name, f"its past_key is {past!r}, which is not the key cache of a layer"))
            continue
        shape: list[str | int | None] = [graph_io.BATCH, graph_io.SEQUENCE, layer.num_heads * layer.value_head_size]
        typed = onnx.helper.make_tensor_value_info(node.output[0], elements[node.input[place]], shape)
        (known.get(node.output[0]) or model.graph.value_info.add()).CopyFrom(typed)
        count += 1
    states, state_misses = _type_states(model, context, elements)
    try:
        model.CopyFrom(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True))
    except Exception as reason:  # slower, equally right
        logger.debug("types and shapes could not be inferred", exc_info=True)
        remark = f"types and shapes could not be inferred, so what needs them is not fused: {cause_of(reason)}"
        context.remarks.extend((layer.layer, remark) for layer in context.spec.layers)
    return Rewritten(count + states, (*misses, *state_misses))


def _type_states(model: onnx.ModelProto, context: Context, elements: dict[str, int]) -> tuple[int, list[NearMiss]]:
    """Type the outputs of the state ops, which read and write fp32 states; counts the calls."""
    states = {graph_io.past_state(state): state for state in context.spec.states}
    count, misses = 0, []
    for node in model.graph.node:
        op = op_of(node)
        if op is None:
            continue
        place = op.input_index("state")
        name = node.input[place] if len(node.input) > place else ""
        if name not in states:
            misses.append(NearMiss(node.name, f"its state is {name!r}, which is not a state of a layer"))
            continue
        count += 1
        sizes = states[name].shape
        shape: list[str | int | None] = [graph_io.BATCH, graph_io.SEQUENCE, sizes[0], sizes[-1]]
        if op is CAUSAL_CONV:
            shape = [graph_io.BATCH, sizes[0], graph_io.SEQUENCE]
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(node.output[0], elements[name], shape))
    return count, misses


INFER: Pass[onnx.ModelProto, Context] = Pass(
    "infer_shapes", infer_shapes, expect=lambda context: len(context.spec.layers) + len(context.spec.states))


def prepare(model: onnx.ModelProto, passes: Sequence[Pass[onnx_ir.Model, Context]],
            context: Context) -> onnx.ModelProto:
    """A copy of `model`, typed, after `passes` over it as an onnx_ir Model. Weights stay recipes; the order of real
    inputs is kept.

    Raises:
        UnsupportedModel: a pass rewrote another number of places than it has to.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = [t for t in copy.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inline = [t for t in copy.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(inline)
    inputs = len(copy.graph.input)
    for tensor in weights:
        copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    run_passes(copy, [INFER], context, context.log)
    if passes:
        from onnx_ir import serde

        graph = serde.deserialize_model(copy)
        run_passes(graph, passes, context, context.log)
        copy = serde.serialize_model(graph)
    del copy.graph.input[inputs:]
    read = {name for node in copy.graph.node for name in node.input}
    copy.graph.initializer.extend(tensor for tensor in weights if tensor.name in read)
    return copy
