"""Finding a rotation by evaluating it: what lies between a projection and the attention op is run on probes.

No formula is matched. The part of the graph between a tensor x and the op's query (or key) that reads nothing but x
and the position ids is cut out and run. It is a rotation that an op can do itself if, in every head, it is linear,
mixes dimension i only with i + R/2 (or 2i with 2i + 1), and depends on nothing but each token's own position; its
cos and sin are what it makes of ones and zeros, so every scaling (linear, llama3, YaRN, ...) and every spelling is
taken as it is. Whatever fails a probe stays outside the op, untouched.

Dimensions as in `gqa_export.contract`. Low precision types are widened to fp32 for the probes: that is how the
models themselves compute the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from .. import cache_io
from ..graph.match import const_value, is_weight, producer, upstream

MOVING = frozenset(("Neg", "Concat", "Slice", "Split", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Cast"))
"""ops between x and the multiplication by cos and sin"""
LINEAR = MOVING | {"Add", "Sub", "Mul", "Expand", "Gather"}
LAYOUTS = ("flat", "BSHD", "BHSD")
CHUNK = 2048
"""positions evaluated at a time"""
LOW = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
TOLERANCE = 2e-6
"""between the cut out graph and the formula, both fp32 on numbers about 1: a handful of roundings of 6e-8 each"""


@dataclass(frozen=True)
class Region:
    """A cut: `source` (laid out as one of LAYOUTS, found by trying) and position ids go in, `output` comes out."""

    source: gs.Tensor
    output: gs.Tensor
    nodes: tuple[gs.Node, ...]


@dataclass(frozen=True)
class Rotation:
    """A proved rotation. cos, sin: [M, R/2] fp32 tables."""

    layout: str
    interleaved: bool
    cos: np.ndarray
    sin: np.ndarray

    @property
    def size(self) -> int:
        """R."""
        return 2 * self.cos.shape[1]

    def same_table(self, other: Rotation) -> bool:
        """Whether both rotate alike."""
        return (self.interleaved == other.interleaved and np.array_equal(self.cos, other.cos)
                and np.array_equal(self.sin, other.sin))


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
                 and t.name != cache_io.INPUT_IDS]
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
                found = _prove(_Probe(region, self._positions, layout, heads, head_size), self._rows)
            except Exception:  # a wrong guess of the layout fails in whatever op of the region comes first
                continue
            if not isinstance(found, str):
                return found
            reasons.append(found)
        return reasons[0] if reasons else "its subgraph cannot be run on probes"


class _Probe:
    """A region as a function of x [B, S, H, D] and positions [B, S], giving [B, S, H, D], all numpy."""

    def __init__(self, region: Region, positions: gs.Tensor | None, layout: str, heads: int, head_size: int) -> None:
        from onnx.reference import ReferenceEvaluator

        assert positions is not None
        self.layout, self.heads, self.head_size = layout, heads, head_size
        self._names = (region.source.name, positions.name)
        self._run = ReferenceEvaluator(_as_model(region, positions)).run

    def __call__(self, x_BSHD: np.ndarray, positions_BS: np.ndarray) -> np.ndarray:
        b, s, h, d = x_BSHD.shape
        x = x_BSHD.astype(np.float32)
        x = x.reshape(b, s, h * d) if self.layout == "flat" else x.transpose(0, 2, 1, 3) if self.layout == "BHSD" else x
        feeds = {self._names[0]: x, self._names[1]: positions_BS.astype(np.int64),
                 cache_io.INPUT_IDS: np.zeros((b, s), np.int64)}
        output = np.asarray(self._run(None, feeds)[0])  # type: ignore[index]
        if output.shape != (b, s, h * d):
            raise ValueError(f"shape {output.shape}")
        return output.reshape(x_BSHD.shape)


def _prove(probe: _Probe, rows: int) -> Rotation | str:
    heads, size = probe.heads, probe.head_size
    unit = np.zeros((size + 1, 2, heads, size), np.float32)
    unit[np.arange(size), :, :, np.arange(size)] = 1
    image = probe(unit, np.tile(np.array([[1, min(2, rows - 1)]]), (size + 1, 1)))
    if image[size].any():
        return "it adds something to what it rotates"
    if (image != image[:, :, :1]).any():
        return "heads are rotated differently"
    map_DD = image[:size, 0, 0] - np.diag(np.diag(image[:size, 0, 0]))
    pairs = np.argwhere(map_DD)
    if not len(pairs) or 0 not in pairs:
        return "it turns no pair that starts at dimension 0"
    half = int(pairs[pairs[:, 0] == 0, 1][0])
    interleaved = half == 1 and len(pairs) > 2
    rotary = int(pairs.max()) + 1 if interleaved else 2 * half
    first, second = _pairs(rotary, interleaved)
    cos, sin = (np.zeros((rows, rotary // 2), np.float32) for _ in range(2))
    for start in range(0, rows, CHUNK):
        stop = min(rows, start + CHUNK)
        x = np.zeros((1, stop - start, heads, size), np.float32)
        x[..., first] = 1
        y = probe(x, np.arange(start, stop)[None])[0, :, 0]
        cos[start:stop], sin[start:stop] = y[:, first], y[:, second]
    found = Rotation(probe.layout, interleaved, cos, sin)
    random = np.random.default_rng(rows)
    for positions in (np.array([[0, 1, 2, 3, 4], [3, 1, 0, 2, 3]]) % rows, random.integers(0, rows, (3, 31)),
                      np.full((1, 2), rows - 1)):
        x = random.standard_normal((*positions.shape, heads, size)).astype(np.float32)
        wanted, got = rotate(x, found, positions), probe(x, positions)
        if not np.abs(wanted - got).max() <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
            return "it is not a rotation by each token's own position"
    return found


def rotate(x_BSHD: np.ndarray, rotation: Rotation, positions_BS: np.ndarray) -> np.ndarray:
    """What an op makes of x [B, S, H, D] with the tables of `rotation`."""
    first, second = _pairs(rotation.size, rotation.interleaved)
    cos, sin = (table[positions_BS][:, :, None] for table in (rotation.cos, rotation.sin))
    turned = x_BSHD.copy()
    turned[..., first] = x_BSHD[..., first] * cos - x_BSHD[..., second] * sin
    turned[..., second] = x_BSHD[..., second] * cos + x_BSHD[..., first] * sin
    return turned


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


def _pairs(rotary: int, interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    half = np.arange(rotary // 2)
    return (2 * half, 2 * half + 1) if interleaved else (half, half + rotary // 2)


def _table_tensors(graph: gs.Graph, positions: gs.Tensor | None) -> tuple[set[int], set[int]]:
    """Ids of the tensors that depend on shapes alone, and on position ids (and shapes) alone. Sorts the graph."""
    graph.toposort()
    shapes: set[int] = set()
    tables: set[int] = set() if positions is None else {id(positions)}
    inputs = {id(tensor) for tensor in graph.inputs if tensor.name == cache_io.INPUT_IDS}
    for node in graph.nodes:
        moving = [tensor for tensor in node.inputs if not isinstance(tensor, gs.Constant) and tensor.name]
        of_shape = node.op == "Shape" and id(moving[0]) in inputs | tables
        if of_shape or (moving and all(id(tensor) in shapes for tensor in moving)):
            shapes |= {id(tensor) for tensor in node.outputs}
        elif moving and not node.domain and all(id(tensor) in shapes | tables for tensor in moving):
            tables |= {id(tensor) for tensor in node.outputs}
    return shapes, tables


def _front(output: gs.Tensor, is_mixed, is_given) -> list[gs.Tensor]:
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


def _as_model(region: Region, positions: gs.Tensor) -> onnx.ModelProto:
    """The region alone, as an fp32 model."""
    nodes = [OnnxExporter.export_node(node) for node in region.nodes]
    constants: dict[str, onnx.TensorProto] = {}
    for node in region.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                value = const_value(tensor)
                assert value is not None
                wide = value.astype(np.float32) if value.dtype == np.float16 else value
                constants[tensor.name] = onnx.numpy_helper.from_array(np.ascontiguousarray(wide), tensor.name)
    for proto in nodes:
        for attribute in proto.attribute:
            if attribute.name == "to" and attribute.i in LOW:
                attribute.i = onnx.TensorProto.FLOAT
    given = {region.source.name: onnx.TensorProto.FLOAT, positions.name: onnx.TensorProto.INT64,
             cache_io.INPUT_IDS: onnx.TensorProto.INT64}
    graph = onnx.helper.make_graph(
        nodes, "rotation", [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in given.items()],
        [onnx.helper.make_tensor_value_info(region.output.name, onnx.TensorProto.FLOAT, None)],
        list(constants.values()))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
