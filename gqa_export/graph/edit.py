"""Changing a graphsurgeon graph: new constants and weights, replacing uses, import and export, all without bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from ..graph_io import RECIPE
from .match import is_output

# It warns of types that NumPy lacks (bfloat16), which it keeps as they are; a user can do nothing about it.
G_LOGGER.severity = G_LOGGER.ERROR


def load(model: onnx.ModelProto) -> gs.Graph:
    """Import a model. Weights stay references."""
    graph = gs.import_onnx(model)
    graph.ir_version = model.ir_version
    return graph


def save(graph: gs.Graph) -> onnx.ModelProto:
    """Export a graph: dead nodes dropped, nodes in topological order, only the opsets in use declared."""
    tidy(graph)
    model = gs.export_onnx(graph)
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    used = {node.domain for node in nodes} | {""}
    for place in reversed(range(len(model.opset_import))):
        if model.opset_import[place].domain not in used:
            del model.opset_import[place]
    return model


def snapshot(graph: gs.Graph) -> onnx.ModelProto:
    """A model of what `graph` is now, which is not changed: the nodes that an output needs, in topological order."""
    model = gs.export_onnx(graph)
    makers = {name: place for place, node in enumerate(model.graph.node) for name in node.output if name}
    order: dict[int, onnx.NodeProto] = {}
    stack = [(makers[value.name], False) for value in reversed(model.graph.output) if value.name in makers]
    while stack:
        place, done = stack.pop()
        node = model.graph.node[place]
        if done:
            order[place] = node
        elif place not in order:
            stack.append((place, True))
            stack.extend((makers[name], False) for name in reads(node) if name in makers and makers[name] not in order)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in order.values()]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    read = {name for node in nodes for name in reads(node)}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    return model


def reads(node: onnx.NodeProto) -> list[str]:
    """The names that a node reads, those that its subgraphs take from around them included."""
    graphs = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    return [*node.input, *(name for graph in graphs for inner in graph.node for name in reads(inner))]


def tidy(graph: gs.Graph) -> int:
    """Drop what no output needs and sort the nodes; returns the number of nodes dropped."""
    before = len(graph.nodes)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return before - len(graph.nodes)


def new_weight(name: str, recipe: str, dtype: Any, shape: Sequence[int]) -> gs.Constant:
    """A constant without bytes that `gqa_export.weights.sources` will fill. recipe: `NAME`, or `A+B+C` for tensors
    joined along axis 0. dtype: numpy dtype or ONNX element type. shape: of the whole."""
    proto = onnx.TensorProto(name=name, dims=list(shape), data_location=onnx.TensorProto.EXTERNAL,
                             data_type=_element_type(dtype))
    proto.external_data.add(key="location", value=RECIPE + recipe)
    return gs.Constant(name, LazyValues(proto), data_location=onnx.TensorProto.EXTERNAL)


def constant(name: str, value: np.ndarray, dtype: Any = None) -> gs.Constant:
    """A constant that lives in the graph, stored as `dtype` (numpy dtype or ONNX element type) if given."""
    element = _element_type(value.dtype if dtype is None else dtype)
    stored = np.ascontiguousarray(value.astype(onnx.helper.tensor_dtype_to_np_dtype(element))).reshape(value.shape)
    proto = onnx.TensorProto(name=name, dims=list(value.shape), data_type=element, raw_data=stored.tobytes())
    return gs.Constant(name, LazyValues(proto))


def add_node(graph: gs.Graph, op: str, inputs: Sequence[gs.Tensor | None], *, name: str, domain: str = "",
             outputs: Sequence[gs.Tensor] | int = 1, attrs: dict[str, Any] | None = None) -> list[gs.Tensor]:
    """Append a node; returns its outputs. inputs: None for one left out. outputs: tensors, or how many to make
    (named `NAME.0`, ...)."""
    outs = [gs.Variable(f"{name}.{place}") for place in range(outputs)] if isinstance(outputs, int) else list(outputs)
    ins = [gs.Variable.empty() if tensor is None else tensor for tensor in inputs]
    while ins and ins[-1].is_empty():
        ins.pop()
    graph.nodes.append(gs.Node(op, name, dict(attrs or {}), ins, outs, domain=domain or None))
    return outs


def replace_uses(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every reader of `old` read `new`. If `old` is a graph output, `new`'s producer takes over its name."""
    if is_output(graph, old):
        node, place = new.inputs[0], next(i for i, out in enumerate(new.inputs[0].outputs) if out is new)
        old.inputs.clear()
        for reader in list(new.outputs):
            _replace_input(reader, new, old)
        node.outputs[place] = old
        return
    for reader in list(old.outputs):
        _replace_input(reader, old, new)


def _replace_input(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    for place, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[place] = new


def remove(node: gs.Node) -> None:
    """Cut a node out of the graph; the next `tidy` drops it."""
    node.inputs.clear()
    node.outputs.clear()


def _element_type(dtype: Any) -> int:
    if isinstance(dtype, int):
        return dtype
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
