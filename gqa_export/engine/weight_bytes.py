"""How many bytes of weights one decode step reads, by the graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..bundle.graph_safety import stored_bytes

if TYPE_CHECKING:
    import onnx

LOOKUPS = ("Gather", "GatherBlockQuantized")
"""operators that read rows of all their inputs but the second, which says which"""
PICKS = "GatherND"
"""reads, of its first input, the entries that the second names"""
NEAR = 16
"""nodes between an index of experts and the TopK that chose it, at most"""


def weight_bytes_read(model: onnx.ModelProto, tokens: int = 1) -> int:
    """Bytes of weights that one decode step reads: all but the tables of which only a row is gathered, and of experts
    those that are chosen.

    Args:
        model: a graph. Experts that are picked by index, or have the rows that chose them, count by how many a token
            chooses; where that cannot be told, all count.
        tokens: new ones in the step (the batch). Each may choose other experts, so beyond one it is an upper bound.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    constants: dict[str, frozenset[str]] = {name: frozenset([name]) for name in stored}
    rows: dict[str, float] = {}
    """tensors that hold the rows of one expert -> the share of experts that have any"""
    read: dict[str, float] = {}
    for node in model.graph.node:
        weights = [constants.get(name, frozenset()) for name in node.input]
        shares = [rows[name] for name in node.input if name in rows]
        if node.input and all(weights):
            whole = frozenset[str]().union(*weights)
            constants.update(dict.fromkeys(node.output, whole))
            continue
        for place, names in enumerate(weights):
            share = shares[0] if shares else _share(node, place, tokens, makers, stored)
            for name in names:
                read[name] = max(read.get(name, 0.0), share)
        if node.op_type == "Split" and len(node.input) > 1 and node.input[1] not in constants:
            share = _chosen(makers.get(node.input[1]), makers, stored) * tokens / len(node.output)
            rows.update(dict.fromkeys(node.output, min(1.0, share)))
        elif shares and node.op_type != "Concat":
            rows.update(dict.fromkeys(node.output, shares[0]))
    return round(sum(stored_bytes(stored[name]) * share for name, share in read.items()))


def _share(node: onnx.NodeProto, place: int, tokens: int, makers: Mapping[str, onnx.NodeProto],
           stored: Mapping[str, onnx.TensorProto]) -> float:
    """The share of a constant input that a node reads."""
    if node.op_type in LOOKUPS and place != 1:
        return 0.0
    tensor = stored.get(node.input[place])
    if node.op_type == PICKS and not place and tensor is not None and tensor.dims:
        return min(1.0, _chosen(makers.get(node.input[1]), makers, stored) * tokens / tensor.dims[0])
    return 1.0


def _chosen(node: onnx.NodeProto | None, makers: Mapping[str, onnx.NodeProto],
            stored: Mapping[str, onnx.TensorProto]) -> float:
    """How many a token chooses by an index: the number of the nearest TopK before it; infinite where there is none."""
    from onnx import numpy_helper

    front, seen = [node], {""}
    for _ in range(NEAR):
        following = []
        for each in front:
            if each is None:
                continue
            count = stored.get(each.input[1]) if each.op_type == "TopK" else None
            if count is not None:
                return float(numpy_helper.to_array(count).reshape(-1)[0])
            fresh = [name for name in each.input if name not in seen]
            seen.update(fresh)
            following += [makers.get(name) for name in fresh]
        front = following
    return math.inf
