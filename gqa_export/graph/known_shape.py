"""What a graph's own nodes say of a tensor's shape, where no shape inference ran: how many axes, and which sizes are
known."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from . import match

Shape = tuple[int | None, ...]
"""a size, or None where it is not known, for each axis"""
SAME = frozenset(("Cast", "Clip", "DequantizeLinear", "Erf", "Exp", "Gelu", "Identity", "LayerNormalization", "Neg",
                  "RMSNormalization", "Reciprocal", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt", "Swish", "Tanh"))
"""operators whose result has the shape of their first input"""
BROADCAST = frozenset(("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub", "Where"))
DEPTH = 32
"""nodes that are looked at behind one another, at most"""


def known_shape(tensor: gs.Tensor) -> Shape | None:
    """The axes of a tensor; None where even their number is not known."""
    return _Shapes().of(tensor, DEPTH)


class _Shapes:
    """One look behind a tensor; what was found is kept."""

    def __init__(self) -> None:
        self._found: dict[int, Shape | None] = {}

    def of(self, tensor: gs.Tensor, depth: int) -> Shape | None:
        if id(tensor) not in self._found:
            self._found[id(tensor)] = self._look(tensor, depth)
        return self._found[id(tensor)]

    def _look(self, tensor: gs.Tensor, depth: int) -> Shape | None:
        if tensor.shape is not None:
            return tuple(size if isinstance(size, int) and size >= 0 else None for size in tensor.shape)
        node = match.producer(tensor)
        if node is None or not depth or (node.domain or ""):
            return None
        if node.op == "Constant":
            value = match.const_value(tensor)
            return None if value is None else value.shape
        if node.op == "Gemm":
            return None, None
        if node.op in BROADCAST:
            return broadcast([self.of(each, depth - 1) for each in node.inputs])
        if node.op in ("Reshape", "Expand"):
            sizes = match.const_value(node.inputs[1])
            if sizes is None or node.op == "Expand":
                return None if sizes is None else broadcast([self.of(node.inputs[0], depth - 1), tuple(sizes.tolist())])
            return tuple(int(size) if size > 0 else None for size in sizes)
        first = self.of(node.inputs[0], depth - 1) if node.inputs else None
        if first is None or node.op in SAME:
            return first
        if node.op in ("Concat", "Split", "TopK"):
            return _unknown(first, [int(node.attrs.get("axis", -1 if node.op == "TopK" else 0))])
        if node.op == "Slice":
            axes = match.const_value(node.inputs[3]) if len(node.inputs) > 3 else None
            return _unknown(first, range(len(first)) if axes is None else axes.tolist())
        if node.op == "Transpose":
            perm = node.attrs.get("perm", range(len(first))[::-1])
            return tuple(first[axis] for axis in perm)
        if node.op == "Unsqueeze":
            return _unsqueezed(first, node)
        if node.op == "ReduceSum":
            return _summed(first, node)
        second = self.of(node.inputs[1], depth - 1) if node.op == "MatMul" else None
        if second is None or len(first) < 2 or len(second) < 2:
            return None
        before = broadcast([first[:-2], second[:-2]])
        return None if before is None else (*before, first[-2], second[-1])


def broadcast(shapes: Sequence[Shape | None]) -> Shape | None:
    """The shape of an element-wise operator's result; None where that of an input is not known."""
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return None
    rank = max(map(len, known), default=0)
    axes = zip(*((1,) * (rank - len(shape)) + shape for shape in known))
    return tuple(_together(sizes) for sizes in axes)


def _together(sizes: Sequence[int | None]) -> int | None:
    larger = [size for size in sizes if size is not None and size != 1]
    return larger[0] if larger else None if None in sizes else 1


def _unknown(shape: Shape, axes: Sequence[int]) -> Shape:
    """A shape whose sizes along some axes are not known."""
    changed = {axis % len(shape) for axis in axes} if shape else set()
    return tuple(None if axis in changed else size for axis, size in enumerate(shape))


def _summed(shape: Shape, node: gs.Node) -> Shape | None:
    axes = match.const_value(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None:
        return None
    gone = {axis % len(shape) for axis in axes.reshape(-1).tolist()}
    keep = node.attrs.get("keepdims", 1)
    return tuple(1 if axis in gone else size for axis, size in enumerate(shape) if keep or axis not in gone)


def _unsqueezed(shape: Shape, node: gs.Node) -> Shape | None:
    axes = match.const_value(node.inputs[1])
    if axes is None:
        return None
    rank = len(shape) + axes.size
    ones, left = {axis % rank for axis in axes.reshape(-1).tolist()}, iter(shape)
    return tuple(1 if axis in ones else next(left) for axis in range(rank))
