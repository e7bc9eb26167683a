"""The guard against left padding in fewer ops, for both ways in which a mask marks the new tokens of a ragged batch.

Dimensions: B, S new tokens, P length of the past axis. A row of the mask [B, P + S] is either the row's past in the
first P columns and its new tokens in the last S (`gqa_export.runtime.feeds`: 1 1 1 0 | 1), or all its tokens in the
first columns (onnxruntime-genai's Engine, and `arange(P + S) < length`: 1 1 1 1 | 0). GroupQueryAttention reads the
number of ones and the width, so both are the same to it. A row of neither kind gives NaN.

In a row of the second kind without a one in the last S columns, all S tokens are new, as GroupQueryAttention counts
them: the lengths that positions and layers outside of it are computed from must be counted so too. A row without new
tokens cannot be told from that; the op has no such row.

A row of ones and zeros has its ones first exactly if their number exceeds the index of the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ... import graph_io
from ...graph import edit
from ...graph.match import consumers, is_op, only_input, produced_by, scalar, sole_consumer
from ...graph.passes import NearMiss, Rewritten
from ..context import Context


def lean_guard(graph: gs.Graph, context: Context) -> Rewritten:
    """Replace hidden + Unsqueeze(Where(bad, NaN, 0)) by a test of the mask and one Where; where anything but
    GroupQueryAttention reads the number of new tokens, count it for both kinds of mask."""
    count, misses = 0, _guards_that_add_to_nothing(graph)
    for node in list(graph.nodes):
        hidden = _guarded(node)
        if hidden is None:
            continue
        place, element = node.name.rpartition("/")[0], context.element
        rows = _mask_rows(graph)
        good_B11 = _good(graph, rows)
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
        edit.tidy(graph)  # the canonical guard reads the mask's last columns too
        _count_new_tokens(graph, rows, context.options.ragged_chunks)
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


QUERY_SEQLENS = 16
"""the place of GroupQueryAttention's input of that name. Source: its schema in ONNX Runtime 1.32"""


@dataclass(frozen=True)
class _MaskRows:
    """What is computed of each row of the mask. steps: int64 [1], S. new_mask: the last S columns. total, new: int64
    [B], ones in the row and in its last S columns. new_first, all_first: bool [B], whether these ones come first
    there, and are at least one."""

    steps: gs.Tensor
    new_mask: gs.Tensor
    total: gs.Tensor
    new: gs.Tensor
    new_first: gs.Tensor
    all_first: gs.Tensor


def _mask_rows(graph: gs.Graph) -> _MaskRows:
    mask, ids = (only_input(graph, name) for name in (graph_io.ATTENTION_MASK, graph_io.INPUT_IDS))
    axis, end = (edit.constant(f"guard/{name}", np.array(value, np.int64)) for name, value in
                 (("axis", [1]), ("end", [np.iinfo(np.int64).max])))
    steps = edit.add_node(graph, "Shape", [ids], name="guard/Shape_0", attrs={"start": 1, "end": 2})[0]
    start = edit.add_node(graph, "Neg", [steps], name="guard/Neg_0")
    new_mask = edit.add_node(graph, "Slice", [mask, *start, end, axis], name="guard/Slice_0")[0]
    new = edit.add_node(graph, "ReduceSum", [new_mask, axis], name="guard/ReduceSum_0", attrs={"keepdims": 0})[0]
    total = _row_sums(mask) or edit.add_node(graph, "ReduceSum", [mask, axis], name="guard/ReduceSum_1",
                                             attrs={"keepdims": 0})[0]
    first = []
    for number, (row, ones) in enumerate(((new_mask, new), (mask, total))):
        last = edit.add_node(graph, "ArgMax", [row], name=f"guard/ArgMax_{number}",
                             attrs={"axis": 1, "keepdims": 0, "select_last_index": 1})
        first += edit.add_node(graph, "Greater", [ones, *last], name=f"guard/Greater_{number}")
    return _MaskRows(steps, new_mask, total, new, *first)


def _row_sums(mask: gs.Tensor) -> gs.Tensor | None:
    """The ones in each row, int64 [B], where the graph counts them already."""
    for node in mask.outputs:
        if is_op(node, "ReduceSum") and len(node.inputs) == 2 and scalar(node.inputs[1]) == 1 \
                and node.attrs.get("keepdims") == 0:
            return node.outputs[0]
    return None


def _good(graph: gs.Graph, rows: _MaskRows) -> gs.Tensor:
    """bool [B, 1, 1]: whether a row of the mask is of either kind."""
    both = edit.constant("guard/axes", np.array([1, 2], np.int64))
    good_B = edit.add_node(graph, "Or", [rows.new_first, rows.all_first], name="guard/Or_0")
    return edit.add_node(graph, "Unsqueeze", [*good_B, both], name="guard/Unsqueeze_0")[0]


def _count_new_tokens(graph: gs.Graph, rows: _MaskRows, attention_too: bool) -> None:
    """Let what reads the sums of the mask's last S columns (positions, layers that fell back, the last logits) read
    them counted for both kinds of mask. The past is the rest of all ones. attention_too: GroupQueryAttention reads
    them as well, as its `query_seqlens`."""
    sums = [node.outputs[0] for part in consumers(only_input(graph, graph_io.ATTENTION_MASK)) if is_op(part, "Slice")
            for node in consumers(part.outputs[0]) if is_op(node, "ReduceSum") and part.outputs[0] is not rows.new_mask]
    if not sums and not attention_too:
        return
    odd_B = edit.add_node(graph, "Not", [rows.new_first], name="guard/new_tokens/Not")
    early_B = edit.add_node(graph, "And", [*odd_B, rows.all_first], name="guard/new_tokens/And")
    steps_B = edit.add_node(graph, "Min", [rows.steps, rows.total], name="guard/new_tokens/Min")
    new_B = edit.add_node(graph, "Where", [*early_B, *steps_B, rows.new], name="guard/new_tokens/Where")[0]
    for tensor in sums:
        edit.replace_uses(graph, tensor, new_B)
    if attention_too:
        counts_B = edit.add_node(graph, "Cast", [new_B], name="guard/new_tokens/Cast",
                                 attrs={"to": onnx.TensorProto.INT32})
        for node in graph.nodes:
            if is_op(node, "GroupQueryAttention", "com.microsoft"):
                empty = [gs.Variable.empty()] * (QUERY_SEQLENS - len(node.inputs))
                node.inputs = [*node.inputs, *empty, *counts_B]
