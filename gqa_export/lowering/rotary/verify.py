"""Proving that a cut out piece of a graph is a rotation of heads, and reading its tables off: see `rotary`.

Dimensions as in `gqa_export.attention_op`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from ... import graph_io
from ...graph.match import const_value

LAYOUTS = ("flat", "BSHD", "BHSD")
CHUNK, ELEMENTS = 2048, 1 << 21
"""positions evaluated at a time: so many, or fewer where a tensor of all heads would hold more numbers than ELEMENTS;
the evaluator keeps every intermediate (128 heads of 128: 0.8 GB with 2,048 positions, 0.05 GB with 128)"""
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


class Probe:
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
                 graph_io.INPUT_IDS: np.zeros((b, s), np.int64)}
        output = np.asarray(self._run(None, feeds)[0])  # type: ignore[index]
        if output.shape != (b, s, h * d):
            raise ValueError(f"shape {output.shape}")
        return output.reshape(x_BSHD.shape)


def prove(probe: Probe, rows: int) -> Rotation | str:
    """The rotation that a region of the graph computes, found by feeding it unit vectors, or why it is none.

    rows: positions to tabulate. The result is checked against the region itself; a formula is never recognised.
    """
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
    chunk = max(1, min(CHUNK, ELEMENTS // (heads * size)))
    for start in range(0, rows, chunk):
        stop = min(rows, start + chunk)
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


def _pairs(rotary: int, interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    half = np.arange(rotary // 2)
    return (2 * half, 2 * half + 1) if interleaved else (half, half + rotary // 2)


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
             graph_io.INPUT_IDS: onnx.TensorProto.INT64}
    graph = onnx.helper.make_graph(
        nodes, "rotation", [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in given.items()],
        [onnx.helper.make_tensor_value_info(region.output.name, onnx.TensorProto.FLOAT, None)],
        list(constants.values()))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
