"""Entries that are picked by constants from an axis that a Transpose puts first, as slices of that axis. The parts of a
packed matrix that a model takes so (Falcon's one key and one value head) are then parts like any other."""

from __future__ import annotations

import sys

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .view import attributes


def plain_entries(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, changed where all readers of a Transpose are GatherNDs by constant indices that follow one another."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer
                 if tensor.data_location != onnx.TensorProto.EXTERNAL}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    nodes: list[onnx.NodeProto] = []
    changed: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        picks = readers.get(node.output[0], []) if node.op_type == "Transpose" else []
        if picks and node.output[0] not in outputs and all(_range(constants, pick, node) for pick in picks):
            changed[node.output[0]] = node
        elif node.input and node.input[0] in changed:
            nodes += _slice(graph, node, changed[node.input[0]], _range(constants, node, changed[node.input[0]]))
        else:
            nodes.append(node)
    if changed:
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
    return model


def _range(constants: dict[str, onnx.TensorProto], pick: onnx.NodeProto,
           turned: onnx.NodeProto) -> tuple[int, int] | None:
    """What a GatherND takes of the first axis of `turned`, [first, last + 1); None where it is none of constants."""
    if pick.op_type != "GatherND" or pick.input[0] != turned.output[0] or pick.input[1] not in constants \
            or any(each.name == "batch_dims" and each.i for each in pick.attribute):
        return None
    index = numpy_helper.to_array(constants[pick.input[1]])
    if index.ndim != 2 or index.shape[1] != 1 or not len(index) or not attributes(turned, "perm"):
        return None
    places = index[:, 0]
    first, last = int(places[0]), int(places[-1])
    if (np.diff(places) != 1).any() or first < 0 <= last:
        return None
    return first, last + 1


def _slice(graph: onnx.GraphProto, pick: onnx.NodeProto, turned: onnx.NodeProto,
           taken: tuple[int, int] | None) -> list[onnx.NodeProto]:
    assert taken is not None
    order = attributes(turned, "perm")
    first, stop = taken[0], taken[1] if taken[1] else sys.maxsize  # up to the last entry, counted from the end
    bounds = []
    for what, number in (("first", first), ("stop", stop), ("axis", order[0])):
        bounds.append(f"{pick.name}/{what}")
        graph.initializer.append(numpy_helper.from_array(np.array([number], np.int64), bounds[-1]))
    part = f"{pick.name}/part"
    return [helper.make_node("Slice", [turned.input[0], *bounds], [f"{part}.0"], name=part),
            helper.make_node("Transpose", [f"{part}.0"], list(pick.output), name=pick.name, perm=order)]
