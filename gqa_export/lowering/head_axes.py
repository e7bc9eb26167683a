"""Reshapes and transposes that undo each other, taken out of a graphsurgeon graph. Layouts as in `rotary.LAYOUTS`."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ..graph import edit
from ..graph.match import const_value, is_op, is_output, produced_by, producer
from ..graph.passes import NearMiss, Rewritten
from .context import Context

SWAP = [0, 2, 1, 3]


def norms_before_transposes(graph: gs.Graph, context: Context) -> Rewritten:
    """norm(Transpose(x)) -> Transpose(norm(x)) for the swap of heads and tokens: the norm runs along the last axis."""
    count, misses = 0, []
    for node in list(graph.nodes):
        swap = produced_by(node.inputs[0], "Transpose") if is_op(node, "SimplifiedLayerNormalization") else None
        if swap is None:
            continue
        if list(swap.attrs["perm"]) != SWAP:
            misses.append(NearMiss(node.name, f"the Transpose before it has perm {list(swap.attrs['perm'])}, "
                                   f"expected {SWAP}"))
            continue
        if is_output(graph, node.outputs[0]):
            misses.append(NearMiss(node.name, "its result is an output of the graph"))
            continue
        old = node.outputs[0]
        new = gs.Variable(f"{node.name}.swapped", old.dtype)
        node.inputs[0], node.outputs[0] = swap.inputs[0], new
        edit.add_node(graph, "Transpose", [new], name=f"{node.name}/Transpose", outputs=[old], attrs={"perm": SWAP})
        count += 1
    return Rewritten(count, tuple(misses))


def unreshape(graph: gs.Graph, context: Context) -> int:
    """Take out Transposes that cancel, Reshapes of Reshapes and Reshapes to the shape that is already there."""
    count = 0
    for node in list(graph.toposort().nodes):
        if is_op(node, "Transpose"):
            count += _untranspose(graph, node)
        elif is_op(node, "Reshape"):
            count += _unreshape(graph, node)
    return count


def _untranspose(graph: gs.Graph, node: gs.Node) -> int:
    inner = produced_by(node.inputs[0], "Transpose")
    if inner is None or [inner.attrs["perm"][axis] for axis in node.attrs["perm"]] != sorted(node.attrs["perm"]):
        return 0
    return _bypass(graph, node, inner.inputs[0])


def _unreshape(graph: gs.Graph, node: gs.Node) -> int:
    shape, count = _plain(node), 0
    inner = produced_by(node.inputs[0], "Reshape")
    while shape and inner is not None and _plain(inner):
        node.inputs[0] = inner.inputs[0]
        inner, count = produced_by(node.inputs[0], "Reshape"), count + 1
    before = node.inputs[0].shape
    if shape and before is not None and len(before) == len(shape) == 3 and before[2] == shape[2]:
        return count + _bypass(graph, node, node.inputs[0])
    return count


def _plain(node: gs.Node) -> list[int] | None:
    """The target shape of a Reshape if it is [0, 0, sizes...]: batch and sequence kept, the rest regrouped."""
    value = const_value(node.inputs[1])
    if value is None or node.attrs.get("allowzero", 0) or value.size < 3:
        return None
    shape = [int(size) for size in value]
    return shape if shape[:2] == [0, 0] and all(size > 0 for size in shape[2:]) else None


def _bypass(graph: gs.Graph, node: gs.Node, tensor: gs.Tensor) -> int:
    if is_output(graph, node.outputs[0]) and producer(tensor) is None:
        return 0
    edit.replace_uses(graph, node.outputs[0], tensor)
    return 1


def flat(graph: gs.Graph, tensor: gs.Tensor, layout: str, width: int, name: str) -> gs.Tensor:
    """`tensor`, laid out as `layout`, as [B, S, width]."""
    if layout == "BHSD":
        tensor = edit.add_node(graph, "Transpose", [tensor], name=f"{name}/Transpose", attrs={"perm": SWAP})[0]
    # a source of more axes (Falcon's groups of queries) is flat in memory, which the proof of a rotation relied on
    if layout != "flat" or len(tensor.shape or ()) > 4:
        shape = edit.constant(f"{name}/shape", np.array([0, 0, width], np.int64))
        tensor = edit.add_node(graph, "Reshape", [tensor, shape], name=f"{name}/Reshape")[0]
    return tensor
