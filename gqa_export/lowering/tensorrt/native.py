"""Target `trt-native`: TensorRT's own attention over a cache written in place, no plugin to ship.

TensorScatter on the 4-D cache becomes TensorRT's cache update, Attention with one output and a boolean mask its
attention. Lengths and windows are in the mask alone: `nonpad_kv_seqlen` is accepted and ignored by TensorRT-RTX 1.7.
TensorRT writes out of bounds without a word, so the first row to write is clamped, and sequences whose padded tokens
would pass the end of the cache get NaN logits. Dimensions as in `gqa_export.attention_op`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ... import attention_op, graph_io
from ...graph import edit, match
from ...graph.node_builder import INT64, Nodes, heads_first
from ...graph.passes import Pass, Rewritten
from ...spec import AttentionSpec
from .. import head_axes
from ..attention_calls import attention_calls, only_fallbacks_are_left
from .common import FIRST, PREPARE  # noqa: F401 PREPARE is this target's too

if TYPE_CHECKING:
    from ..context import Context

OPSET = 24


class Lengths:
    """What depends on lengths alone, made once: where to write, who sees whom, which sequences cannot be.

    dense: masks are compared in their four dimensions. TensorRT-RTX 1.7 does not build an engine for one sequence at a
    time of a bf16 graph of two layers whose mask gets its second dimension by an Unsqueeze ("Error while verifying
    IR"); graphs of other types build, and stay as they were.
    """

    def __init__(self, graph: gs.Graph, call: gs.Node, dense: bool = False) -> None:
        self.node, self._dense = Nodes(graph, "lengths"), dense
        node = self.node
        inputs = dict(zip(attention_op.INPUT_NAMES, call.inputs))
        steps = node("steps", "Shape", match.only_input(graph, graph_io.INPUT_IDS), start=1, end=2)
        capacity = edit.constant("lengths/capacity", np.array([inputs["past_key"].shape[2]], np.int64))
        past_B = node("past", "Cast", inputs["past_lengths"], to=INT64)
        new_B = node("new", "Cast", inputs["new_lengths"], to=INT64)
        last_start = node("last_start", "Sub", capacity, steps)
        self.start_B = node("start", "Max", node("start/low", "Min", past_B, last_start), [0])
        step_S = self._range("step", steps)
        self.cache_C = self._range("place", capacity)
        past_B1 = node("past_column", "Unsqueeze", past_B, [1])
        row_BS = node("position/row", "Add", past_B1, step_S)
        self.position = node("position", "Unsqueeze", row_BS, [1, 3] if dense else [2])
        over = node("over_capacity", "Greater", past_B, last_start)
        below = node("below_zero", "Less", past_B, [0])
        beyond = node("over_steps", "Greater", new_B, steps)
        broken_B = node("broken", "Or", node("broken_past", "Or", over, below), beyond)
        self.broken_B11 = node("broken_rows", "Unsqueeze", broken_B, [1, 2])
        self._masks: dict[int, gs.Tensor] = {}

    def _range(self, label: str, size: gs.Tensor) -> gs.Tensor:
        return self.node(f"{label}/range", "Range", 0, self.node(f"{label}/end", "Squeeze", size, [0]), 1)

    def mask(self, window: int) -> gs.Tensor:
        """bool [B, 1, S, C]: which cached tokens each new one sees; `window` counts itself, 0 is no limit.

        A padded token sees what it would see if it were real, itself at least: a row that saw nothing would be NaN,
        and its keys and values, written behind the real ones, would make NaN of every later step.
        """
        if window not in self._masks:
            node, label = self.node, f"mask_{window}"
            seen = node(f"{label}/causal", "LessOrEqual", self.cache_C, self.position)
            if window:
                before = node(f"{label}/before", "Sub", self.position, window)
                seen = node(f"{label}/window", "And", seen, node(f"{label}/near", "Greater", self.cache_C, before))
            self._masks[window] = seen if self._dense else node(label, "Unsqueeze", seen, [1])
        return self._masks[window]


def lower_attention(graph: gs.Graph, context: Context) -> Rewritten:
    """Every call -> two TensorScatters and one Attention; then NaN logits (and hidden states) for sequences that cannot
    be."""
    calls, misses = attention_calls(graph, context)
    if not calls:
        return Rewritten(0, misses)
    lengths = Lengths(graph, calls[0].node, dense=context.element == onnx.TensorProto.BFLOAT16)
    presents: dict[int, list[gs.Tensor]] = {}
    for call, layer in calls:
        presents.setdefault(layer.cache, list(call.outputs[1:]))
        _lower_call(graph, call, layer, lengths, presents[layer.cache])
    nan = edit.constant("lengths/nan", np.array(np.nan, np.float32), context.element)
    for answer, name in ((each, each.name) for each in graph.outputs):
        if name in (graph_io.LOGITS, graph_io.HIDDEN_STATES):
            maker, honest = answer.inputs[0], gs.Variable(f"lengths/{name}", answer.dtype)
            maker.outputs[next(i for i, out in enumerate(maker.outputs) if out is answer)] = honest
            edit.add_node(graph, "Where", [lengths.broken_B11, nan, honest], outputs=[answer],
                          name="lengths/loud" if name == graph_io.LOGITS else "lengths/loud_hidden")
    return Rewritten(len(calls), misses)


def _lower_call(graph: gs.Graph, call: gs.Node, layer: AttentionSpec, lengths: Lengths,
                presents: list[gs.Tensor]) -> None:
    """presents: the key and value that it attends to, its own or those of the layer whose cache it reads."""
    scope, _, name = call.name.rpartition("/")
    node = Nodes(graph, f"{scope}/{name.replace(attention_op.OP, 'Attention')}")
    inputs, output = dict(zip(attention_op.INPUT_NAMES, call.inputs)), call.outputs[0]
    edit.remove(call)
    query = heads_first(node, "query", inputs["query"], layer.num_heads, layer.head_size)
    for kind, present in zip(("key", "value"), presents if layer.owner is None else ()):
        new = heads_first(node, kind, inputs[kind], layer.kv_num_heads, layer.head_size)
        edit.add_node(graph, "TensorScatter", [inputs[f"past_{kind}"], new, lengths.start_B],
                      name=f"{node.scope}/present_{kind}", outputs=[present], attrs={"axis": 2})
    mixed_BHSD = node("core", "Attention", query, *presents, lengths.mask(layer.window), scale=layer.scale)
    mixed_BSHD = node("output/heads_last", "Transpose", mixed_BHSD, perm=[0, 2, 1, 3])
    width = layer.num_heads * layer.head_size
    edit.replace_uses(graph, output, node("output", "Reshape", mixed_BSHD, [0, 0, width]))


PASSES = [
    *FIRST,
    Pass("lower_attention", lower_attention, requires=("refuse_layers", "literal_capacity"),
         ensures=only_fallbacks_are_left, expect=lambda context: len(context.spec.layers)),
    Pass("unreshape", head_axes.unreshape, requires=("lower_attention",)),
]


def finish(model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
    """Set the opset that has TensorScatter; every op of 23 means the same in 24."""
    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = OPSET
    return model
