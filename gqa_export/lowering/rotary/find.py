"""Finding a rotation by evaluating it: what lies between a projection and the attention op is run on probes.

No formula is matched. The part of the graph between a tensor x and the op's query (or key) that reads nothing but x
and the position ids is cut out and run. It is a rotation that an op can do itself if, in every head, it is linear,
mixes dimension i only with i + R/2 (or 2i with 2i + 1), and depends on nothing but each token's own position; its
cos and sin are what it makes of ones and zeros, so every scaling (linear, llama3, YaRN, ...) and every spelling is
taken as it is. Whatever fails a probe stays outside the op, untouched.

Dimensions as in `gqa_export.attention_op`. Low precision types are widened to fp32 for the probes: that is how the
models themselves compute the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_graphsurgeon as gs

from ... import graph_io
from ...graph.match import const_value, is_weight, producer, upstream
from .verify import LAYOUTS, Probe, Region, Rotation, prove

MOVING = frozenset(("Neg", "Concat", "Slice", "Split", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Cast"))
"""ops between x and the multiplication by cos and sin"""
LINEAR = MOVING | {"Add", "Sub", "Mul", "Expand", "Gather"}


class Finder:
    """Looks for rotations in one graph. Probes are run once per different region, not once per layer."""

    def __init__(self, graph: gs.Graph, positions: gs.Tensor | None, rows: int) -> None:
        """positions: the int64 [B, S] tensor of position ids, None if the graph has none. rows: M."""
        self._positions, self._rows = positions, rows
        self._shapes, self._tables = _table_tensors(graph, positions)
        self._known: dict[Any, Rotation | str] = {}

    def find(self, tensor: gs.Tensor, heads: int, head_size: int) -> tuple[Region, Rotation] | str | None:
        """The rotation that `tensor` [B, S, heads * head_size] is the outcome of; None if no position enters it on
        the way from its projection; a reason if something is there that cannot be taken for a rotation."""
        cut = self._cut(tensor)
        if cut is None or isinstance(cut, str):
            return cut
        key = (_signature(cut, self._positions), heads, head_size)
        if key not in self._known:
            self._known[key] = self._prove(cut, heads, head_size)
        found = self._known[key]
        return found if isinstance(found, str) else (cut, found)

    def _cut(self, output: gs.Tensor) -> Region | str | None:
        mixed: dict[int, bool] = {}

        def is_mixed(tensor: gs.Tensor) -> bool:
            node = producer(tensor)
            if node is None or id(tensor) in self._tables or node.op not in LINEAR or node.domain:
                return False
            if id(node) not in mixed:
                mixed[id(node)] = False
                inner = [is_mixed(each) for each in node.inputs]
                mixed[id(node)] = any(inner) or any(id(each) in self._tables for each in node.inputs)
            return mixed[id(node)]

        if not is_mixed(output):
            return None
        front = _front(output, is_mixed, lambda tensor: self._is_given(tensor))
        while len(front) > 1:
            deepest = max(front, key=_depth)
            node = producer(deepest)
            if node is None or node.op not in MOVING or node.domain:
                return f"{len(front)} different tensors are rotated together"
            front = [tensor for tensor in front if producer(tensor) is not node]
            front += [t for t in node.inputs if not self._is_given(t) and all(t is not f for f in front)]
        if not front:
            return "no tensor enters the rotation"
        source = front[0]
        while (node := producer(source)) is not None and node.op in ("Transpose", "Reshape") and not node.domain:
            source = node.inputs[0]
        nodes, border = upstream([output], [source, self._positions])
        extra = [t.name for t in border if t is not source and t is not self._positions
                 and t.name != graph_io.INPUT_IDS]
        if extra:
            return f"the rotation depends on {extra[0]!r}, not on positions alone"
        if any(is_weight(tensor) for node in nodes for tensor in node.inputs):
            return "a weight enters the rotation"
        return Region(source, output, tuple(nodes))

    def _is_given(self, tensor: gs.Tensor) -> bool:
        return (id(tensor) in self._tables or id(tensor) in self._shapes or not tensor.name
                or const_value(tensor) is not None)

    def _prove(self, region: Region, heads: int, head_size: int) -> Rotation | str:
        reasons = []
        for layout in LAYOUTS:
            try:
                found = prove(Probe(region, self._positions, layout, heads, head_size), self._rows)
            except Exception:  # a wrong guess of the layout fails in whatever op of the region comes first
                continue
            if not isinstance(found, str):
                return found
            reasons.append(found)
        return reasons[0] if reasons else "its subgraph cannot be run on probes"


def position_ids(lengths: Sequence[gs.Tensor]) -> gs.Tensor | None:
    """The int64 [B, S] tensor past_lengths[:, None] + arange(S), found from the past_lengths that the layers read."""
    waiting, seen = list(lengths), set()
    while waiting:
        tensor = waiting.pop()
        for node in tensor.outputs:
            if node.domain or id(node) in seen:
                continue
            seen.add(id(node))
            if node.op in ("Unsqueeze", "Cast", "Reshape", "Expand"):
                waiting.append(node.outputs[0])
            elif node.op == "Add" and any(_is_range(each) for each in node.inputs):
                return node.outputs[0]
    return None


def _is_range(tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    while node is not None and node.op in ("Unsqueeze", "Cast", "Reshape"):
        node = producer(node.inputs[0])
    return node is not None and node.op == "Range"


def _table_tensors(graph: gs.Graph, positions: gs.Tensor | None) -> tuple[set[int], set[int]]:
    """Ids of the tensors that depend on shapes alone, and on position ids (and shapes) alone. Sorts the graph."""
    graph.toposort()
    shapes: set[int] = set()
    tables: set[int] = set() if positions is None else {id(positions)}
    inputs = {id(tensor) for tensor in graph.inputs if tensor.name == graph_io.INPUT_IDS}
    for node in graph.nodes:
        moving = [tensor for tensor in node.inputs if not isinstance(tensor, gs.Constant) and tensor.name]
        of_shape = node.op == "Shape" and id(moving[0]) in inputs | tables
        if of_shape or (moving and all(id(tensor) in shapes for tensor in moving)):
            shapes |= {id(tensor) for tensor in node.outputs}
        elif moving and not node.domain and all(id(tensor) in shapes | tables for tensor in moving):
            tables |= {id(tensor) for tensor in node.outputs}
    return shapes, tables


def _front(output: gs.Tensor, is_mixed: Callable[[gs.Tensor], bool],
           is_given: Callable[[gs.Tensor], bool]) -> list[gs.Tensor]:
    """The tensors that enter the mixed nodes above `output` and are neither mixed nor given."""
    front: list[gs.Tensor] = []
    seen: set[int] = set()
    waiting = [output]
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if is_mixed(tensor):
            node = producer(tensor)
            waiting.extend(node.inputs if node else [])
        elif not is_given(tensor):
            front.append(tensor)
    return front


def _depth(tensor: gs.Tensor) -> int:
    """How many moving ops lie above a tensor."""
    node, depth = producer(tensor), 0
    while node is not None and node.op in MOVING and not node.domain:
        depth += 1
        node = max((producer(t) for t in node.inputs), key=lambda n: n is not None and n.op in MOVING, default=None)
    return depth


def _signature(region: Region, positions: gs.Tensor | None) -> Any:
    """Equal for regions that compute the same: ops, attributes, wiring, constants by value."""
    number: dict[int, Any] = {id(region.source): "x", id(positions): "positions"}
    rows = []
    for node in region.nodes:
        ins: list[Any] = []
        for tensor in node.inputs:
            if id(tensor) not in number:
                value = const_value(tensor)
                number[id(tensor)] = ((value.dtype.str, value.shape, value.tobytes()) if value is not None
                                      else tensor.name)
            ins.append(number[id(tensor)])
        for tensor in node.outputs:
            number[id(tensor)] = len(number)
        rows.append((node.op, node.domain or "", tuple(ins), repr(sorted(node.attrs.items(), key=lambda a: a[0]))))
    return tuple(rows), number[id(region.output)]
