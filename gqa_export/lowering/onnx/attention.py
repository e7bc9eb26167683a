"""Canonical op -> ai.onnx Attention over a cache that Concat + GatherND (growing) or TensorScatter (static) made.

Whatever depends on lengths alone is computed once and shared by all layers: where each cache row comes from, one
mask [B, 1, S, T] per window or size of chunk, which output rows are real. Dimensions as in
`gqa_export.attention_op`; N is min(S, C), the rows that a static write touches. Source: onnx
docs/Operators.md, Attention-23/24, TensorScatter-24.

A mask is boolean, but for a static cache in fp16, whose unused part may hold anything finite: there it is 0 and -inf.
The standard makes the same of a boolean one, yet ONNX Runtime adds the lowest number of the type in place of -inf, and
in fp16 that is -65504: a score of more than that stayed the largest. Source: onnxruntime
core/providers/cpu/llm/attention.cc, `mask_filter_value`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ... import attention_op, graph_io
from ...graph import edit, match
from ...graph.node_builder import INT64, Nodes, heads_first
from ...graph.passes import Rewritten
from ...spec import AttentionSpec
from .. import kv_codes
from ..attention_calls import attention_calls
from ..context import Context


class Lengths:
    """The shared part, built from the lengths of the first call; later requests for the same thing reuse it."""

    def __init__(self, graph: gs.Graph, call: gs.Node, context: Context) -> None:
        self.node = node = Nodes(graph, "lengths")
        self.growing = context.options.cache == "growing"
        self.element, self.kv = context.element, context.options.kv
        self.cached = self.element if self.kv is None else int(onnx.TensorProto.INT8)
        ids, past = match.only_input(graph, graph_io.INPUT_IDS), call.inputs[attention_op.input_index("past_key")]
        self.batch = node("batch", "Shape", ids, start=0, end=1)
        self.steps = node("steps", "Shape", ids, start=1, end=2)
        self.axis = node("past_axis", "Shape", past, start=2, end=3)
        past_B = node("past", "Cast", call.inputs[attention_op.input_index("past_lengths")], to=INT64)
        new_B = node("new", "Cast", call.inputs[attention_op.input_index("new_lengths")], to=INT64)
        self.past_B1 = node("past_column", "Unsqueeze", past_B, [1])
        self.new_B1 = node("new_column", "Unsqueeze", new_B, [1])
        self.total_B1 = node("total", "Add", self.past_B1, self.new_B1)
        self.present_axis = node("present_axis", "Add", self.axis, self.steps) if self.growing else self.axis
        self.step_S = self._range("step", self.steps)
        self.cache_T = self._range("place", self.present_axis)
        position_BS = self.node("position/row", "Add", self.past_B1, self.step_S)
        self.position_BS1 = self.node("position", "Unsqueeze", position_BS, [2])
        self._rows()
        self._made: dict[tuple[Any, ...], Any] = {}
        self._added = [edit.constant(f"lengths/{name}", np.array(value), self.element)
                       for name, value in (("seen", 0.0), ("unseen", -np.inf))
                       if not self.growing and self.element == onnx.TensorProto.FLOAT16]
        if self.growing:
            self._growing_places()
        else:
            self._static_places()

    def _range(self, label: str, size: gs.Tensor) -> gs.Tensor:
        return self.node(f"{label}/range", "Range", 0, self.node(f"{label}/end", "Squeeze", size, [0]), 1)

    def _rows(self) -> None:
        """real_BS1: rows to keep. fill_BS1: what stands in the others, 0 or, where lengths cannot be, NaN."""
        node = self.node
        over = node("over_axis", "Greater", self.total_B1, self.present_axis)
        below = node("below_zero", "Less", self.past_B1, 0)
        beyond = node("over_steps", "Greater", self.new_B1, self.steps)
        broken_B1 = node("broken", "Or", node("broken_past", "Or", over, below), beyond)
        row_BS = node("row", "Less", self.step_S, self.new_B1)
        sound_B1 = node("sound", "Not", broken_B1)
        self.row_BS1 = node("row/column", "Unsqueeze", row_BS, [2])
        self.real_BS1 = node("real", "Unsqueeze", node("real_row", "And", row_BS, sound_B1), [2])
        misused_BS1 = node("loud", "Unsqueeze", node("loud_row", "And", row_BS, broken_B1), [2])
        nan, zero = (edit.constant(f"lengths/{name}", np.array(value), self.element)
                     for name, value in (("nan", np.nan), ("zero", 0.0)))
        self.fill_BS1 = node("fill", "Where", misused_BS1, nan, zero)

    def _growing_places(self) -> None:
        """Row t of the present: t of past, else t - past_length of new, else (no valid token) the row of zeros."""
        node = self.node
        new_place = node("new_place", "Add", self.cache_T, node("shift", "Sub", self.axis, self.past_B1))
        place = node("place/kept", "Where", node("is_past", "Less", self.cache_T, self.past_B1), self.cache_T,
                     new_place)
        valid = node("valid", "Less", self.cache_T, self.total_B1)
        place = node("place/valid", "Where", valid, place, self.present_axis)
        self.place_B1T1 = node("place/index", "Unsqueeze", node("place/clamped", "Min", place, self.present_axis),
                               [1, 3])

    def _static_places(self) -> None:
        """N rows from `start` on are rewritten: with new tokens where they belong, with themselves elsewhere.

        A plain write of S rows at past_length would pass the end of the cache where padding does and tokens do not.
        """
        node = self.node
        self.count = node("count", "Min", self.steps, self.axis)
        last_start = node("last_start", "Sub", self.axis, self.count)
        start_B1 = node("start", "Max", node("start/low", "Min", self.past_B1, last_start), [0])
        self.start_B = node("start/index", "Squeeze", start_B1, [1])
        row_BN = node("write/row", "Add", start_B1, self._range("write", self.count))
        from_past = node("write/not_past", "GreaterOrEqual", row_BN, self.past_B1)
        in_new = node("write/is_new", "And", from_past, node("write/valid", "Less", row_BN, self.total_B1))
        offset = node("write/offset", "Max", node("write/new", "Sub", row_BN, self.past_B1), 0)
        offset = node("write/clamped", "Min", offset, node("write/last", "Sub", self.steps, 1))
        self.is_new_B1N1 = node("write/choose", "Unsqueeze", in_new, [1, 3])
        self.old_B1N1 = node("write/old_index", "Unsqueeze", row_BN, [1, 3])
        self.new_B1N1 = node("write/new_index", "Unsqueeze", offset, [1, 3])

    def per_heads(self, index_B1X1: gs.Tensor, label: str, size: gs.Tensor, kv_heads: int) -> gs.Tensor:
        """An index repeated for every key/value head: [B, K, X, 1]."""
        key = (label, kv_heads)
        if key not in self._made:
            shape = self.node(f"{label}/shape_{kv_heads}", "Concat", self.batch, [kv_heads], size, [1], axis=0)
            self._made[key] = self.node(f"{label}/heads_{kv_heads}", "Expand", index_B1X1, shape)
        return self._made[key]

    def zero_row(self, kv_heads: int, size: int) -> gs.Tensor:
        """Zeros [B, K, 1, size], of what the cache holds."""
        key = ("zeros", kv_heads, size)
        if key not in self._made:
            label = f"zeros_{kv_heads}_{size}"
            zeros = edit.constant(f"lengths/{label}/row", np.zeros((1, kv_heads, 1, size)), self.cached)
            shape = self.node(f"{label}/shape", "Concat", self.batch, [1, 1, 1], axis=0)
            self._made[key] = self.node(label, "Expand", zeros, shape)
        return self._made[key]

    def mask(self, window: int, chunk: int) -> gs.Tensor:
        """bool or fp16 [B, 1, S, T]: which cached tokens each new one sees; `window` counts itself, 0 is no limit;
        `chunk`: none before its own chunk, 0 is no chunks."""
        key = ("mask", window, chunk)
        if key not in self._made:
            node, label = self.node, f"mask_chunk_{chunk}" if chunk else f"mask_{window}"
            seen = node(f"{label}/causal", "LessOrEqual", self.cache_T, self.position_BS1)
            if window:
                near = node(f"{label}/near", "Greater", self.cache_T,
                            node(f"{label}/before", "Sub", self.position_BS1, window))
                seen = node(f"{label}/window", "And", seen, near)
            if chunk:
                number = node(f"{label}/number", "Div", self.position_BS1, chunk)
                inside = node(f"{label}/inside", "GreaterOrEqual", self.cache_T,
                              node(f"{label}/first", "Mul", number, chunk))
                seen = node(f"{label}/chunk", "And", seen, inside)
            seen = node(f"{label}/rows", "And", seen, self.row_BS1)
            if self._added:
                seen = node(f"{label}/added", "Where", seen, *self._added)
            self._made[key] = node(label, "Unsqueeze", seen, [1])
        return self._made[key]


def lower_attention(graph: gs.Graph, context: Context) -> Rewritten:
    """Replace every call whose layer Attention can hold; the others are recorded as fallbacks."""
    calls, misses = attention_calls(graph, context)
    lengths: Lengths | None = None
    count = 0
    presents: dict[int, list[gs.Tensor]] = {}
    for call, layer in calls:
        if layer.owner is None:
            presents[layer.layer] = list(call.outputs[1:])
        if context.fall_back(layer):
            continue
        lengths = lengths or Lengths(graph, call, context)
        held = _lower_call(graph, call, layer, lengths, presents[layer.cache] if layer.owner is not None else None)
        if layer.owner is None:
            presents[layer.layer] = held
        count += 1
    return Rewritten(count, misses)


def _lower_call(graph: gs.Graph, call: gs.Node, layer: AttentionSpec, lengths: Lengths,
                shared: list[gs.Tensor] | None) -> list[gs.Tensor]:
    """Replace a call; the keys and values that it attends to. shared: those of another layer, which it reads."""
    scope, _, name = call.name.rpartition("/")
    node = Nodes(graph, f"{scope}/{name.replace(attention_op.OP, 'Attention')}")
    inputs, (flat_output, *present_outputs) = list(call.inputs), list(call.outputs)
    edit.remove(call)
    query = heads_first(node, "query", inputs[0], layer.num_heads, layer.head_size)
    present = shared or _write(graph, node, layer, inputs, present_outputs, lengths)
    attrs: dict[str, Any] = {"scale": layer.scale}
    if lengths.element != onnx.TensorProto.FLOAT:
        attrs["softmax_precision"] = int(onnx.TensorProto.FLOAT)
    mixed_BHSE = node("core", "Attention", query, *present, lengths.mask(layer.window, layer.chunk), **attrs)
    mixed_BSHE = node("output/heads_last", "Transpose", mixed_BHSE, perm=[0, 2, 1, 3])
    mixed_BSX = node("output/flat", "Reshape", mixed_BSHE, [0, 0, layer.num_heads * layer.value_head_size])
    output = node("output", "Where", lengths.real_BS1, mixed_BSX, lengths.fill_BS1)
    edit.replace_uses(graph, flat_output, output)
    return present


def _write(graph: gs.Graph, node: Nodes, layer: AttentionSpec, inputs: list[gs.Tensor],
           present_outputs: list[gs.Tensor], lengths: Lengths) -> list[gs.Tensor]:
    """Write a layer's new keys and values into its cache; the whole of both, as numbers."""
    present, code_scales = [], _code_scales(lengths, layer, inputs, present_outputs)
    for place, size in ((1, layer.head_size), (2, layer.value_head_size)):
        label, kv_heads = attention_op.INPUT_NAMES[place], layer.kv_num_heads
        new = heads_first(node, label, inputs[place], kv_heads, size)
        if code_scales:
            new = kv_codes.quantized(node, label, new, code_scales[place - 1], lengths.element)
        past = inputs[attention_op.input_index(f"past_{label}")]
        written = (_grow if lengths.growing else _scatter)(node, label, past, new, kv_heads, size, lengths)
        edit.replace_uses(graph, old := present_outputs[place - 1], written)
        held = old if match.is_output(graph, old) else written
        if code_scales:
            held = kv_codes.dequantized(node, label, held, code_scales[place - 1], lengths.element)
        present.append(held)
    return present


def _code_scales(lengths: Lengths, layer: AttentionSpec, inputs: list[gs.Tensor],
                 presents: list[gs.Tensor]) -> list[float]:
    """The scales of a layer's keys and values where its cache holds codes, which its tensors then are; else []."""
    if lengths.kv is None:
        return []
    first = attention_op.input_index("past_key")
    kv_codes.retype(lengths.kv, layer, inputs[first:first + 2], presents)
    scales = kv_codes.scales_of(lengths.kv, layer.layer)
    return [scales.key, scales.value]


def _grow(node: Nodes, label: str, past: gs.Tensor, new: gs.Tensor, kv_heads: int, size: int,
          lengths: Lengths) -> gs.Tensor:
    rows = node(f"{label}/rows", "Concat", past, new, lengths.zero_row(kv_heads, size), axis=2)
    index = lengths.per_heads(lengths.place_B1T1, "place", lengths.present_axis, kv_heads)
    return node(f"present_{label}", "GatherND", rows, index, batch_dims=2)


def _scatter(node: Nodes, label: str, past: gs.Tensor, new: gs.Tensor, kv_heads: int, size: int,
             lengths: Lengths) -> gs.Tensor:
    old_index = lengths.per_heads(lengths.old_B1N1, "write/old", lengths.count, kv_heads)
    new_index = lengths.per_heads(lengths.new_B1N1, "write/new_token", lengths.count, kv_heads)
    old_rows = node(f"{label}/old_rows", "GatherND", past, old_index, batch_dims=2)
    new_rows = node(f"{label}/new_rows", "GatherND", new, new_index, batch_dims=2)
    update = node(f"{label}/update", "Where", lengths.is_new_B1N1, new_rows, old_rows)
    return node(f"present_{label}", "TensorScatter", past, update, lengths.start_B, axis=2)


