"""The guard against left padding in fewer ops: NaN for a row whose mask has a 0 before a 1 among its new tokens.

A row of ones and zeros has its ones first exactly if their number exceeds the index of the last one.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ... import graph_io
from ...graph import edit
from ...graph.match import is_op, only_input, produced_by, scalar, sole_consumer
from ...graph.passes import NearMiss, Rewritten
from ..context import Context


def lean_guard(graph: gs.Graph, context: Context) -> Rewritten:
    """Replace hidden + Unsqueeze(Where(bad, NaN, 0)) by a test of the mask's last columns and one Where."""
    count, misses = 0, _guards_that_add_to_nothing(graph)
    for node in list(graph.nodes):
        hidden = _guarded(node)
        if hidden is None:
            continue
        place, element = node.name.rpartition("/")[0], context.element
        good_B11 = _ones_first(graph)
        output = node.outputs[0]
        edit.remove(node)
        if element == onnx.TensorProto.BFLOAT16:  # ONNX Runtime has no Where for it
            zero = edit.constant("guard/zero", np.array(0, np.float32))
            nan = edit.constant("guard/nan", np.array(np.nan, np.float32))
            wide = edit.add_node(graph, "Where", [good_B11, zero, nan], name=f"{place}/guard/Where")
            narrow = edit.add_node(graph, "Cast", wide, name=f"{place}/guard/Cast", attrs={"to": element})
            edit.add_node(graph, "Add", [hidden, *narrow], name=f"{place}/guard/Add", outputs=[output])
        else:
            nan = edit.constant("guard/nan", np.array(np.nan, np.float32), element)
            edit.add_node(graph, "Where", [good_B11, hidden, nan], name=f"{place}/guard/Where", outputs=[output])
        count += 1
    edit.tidy(graph)
    return Rewritten(count, misses)


def _guarded(node: gs.Node) -> gs.Tensor | None:
    """What a node adds NaN or zero per row to; None if it does not do that."""
    if not is_op(node, "Add"):
        return None
    for hidden, bias in (node.inputs, reversed(node.inputs)):
        wide = produced_by(bias, "Unsqueeze")
        where = produced_by(wide.inputs[0], "Where") if wide is not None else None
        if where is not None:
            values = [scalar(tensor) for tensor in where.inputs[1:]]
            if None not in values and np.isnan(np.array(values, np.float64)).any():
                return hidden
    return None


def _guards_that_add_to_nothing(graph: gs.Graph) -> tuple[NearMiss, ...]:
    """The Wheres that choose between NaN and another number and whose result is not added to anything per row."""
    misses = []
    for node in graph.nodes:
        if not is_op(node, "Where"):
            continue
        values = [scalar(tensor) for tensor in node.inputs[1:]]
        if None in values or not np.isnan(np.array(values, np.float64)).any():
            continue
        wide = sole_consumer(graph, node.outputs[0])
        if not is_op(wide, "Unsqueeze"):
            misses.append(NearMiss(wide.name if wide else node.name, "expected the Unsqueeze of a guard's NaN"))
            continue
        for reader in wide.outputs[0].outputs:
            if not is_op(reader, "Add"):
                misses.append(NearMiss(reader.name, f"it is {reader.op}, expected the Add of a guard's NaN"))
    return tuple(misses)


def _ones_first(graph: gs.Graph) -> gs.Tensor:
    """bool [B, 1, 1]: whether a row of attention_mask's last S columns has its ones first, and at least one."""
    mask, ids = (only_input(graph, name) for name in (graph_io.ATTENTION_MASK, graph_io.INPUT_IDS))
    axis, end, both = (edit.constant(f"guard/{name}", np.array(value, np.int64)) for name, value in
                       (("axis", [1]), ("end", [np.iinfo(np.int64).max]), ("axes", [1, 2])))
    new = edit.add_node(graph, "Shape", [ids], name="guard/Shape_0", attrs={"start": 1, "end": 2})
    start = edit.add_node(graph, "Neg", new, name="guard/Neg_0")
    mask_BS = edit.add_node(graph, "Slice", [mask, *start, end, axis], name="guard/Slice_0")
    ones_B = edit.add_node(graph, "ReduceSum", [*mask_BS, axis], name="guard/ReduceSum_0", attrs={"keepdims": 0})
    last_B = edit.add_node(graph, "ArgMax", mask_BS, name="guard/ArgMax_0",
                           attrs={"axis": 1, "keepdims": 0, "select_last_index": 1})
    good_B = edit.add_node(graph, "Greater", [*ones_B, *last_B], name="guard/Greater_0")
    return edit.add_node(graph, "Unsqueeze", [*good_B, both], name="guard/Unsqueeze_0")[0]
