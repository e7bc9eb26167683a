"""A typed canonical model to look around in: producers, consumers, shapes, values of constants. Nothing is changed."""

from __future__ import annotations

import onnx
from onnx import helper, numpy_helper

from .. import attention_op
from .facts import Shape


class View:
    """The graph of a model whose values all have a shape, as far as that is known.

    Attributes:
        nodes: in graph order.
        shapes: of each tensor.
        types: ONNX element type of each tensor.
        made_by: the node that computes a tensor.
        read_by: the nodes that read a tensor, in graph order.
        initializers: by name.
        outputs: names of the graph's outputs.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.nodes = list(graph.node)
        self.shapes: dict[str, Shape] = {}
        self.types: dict[str, int] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            self.shapes[value.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim)
            self.types[value.name] = tensor.elem_type
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        for tensor in graph.initializer:
            self.shapes[tensor.name], self.types[tensor.name] = tuple(tensor.dims), tensor.data_type
        self.made_by: dict[str, onnx.NodeProto] = {}
        self.read_by: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.output:
                self.made_by[name] = node
            for name in dict.fromkeys(node.input):
                self.read_by.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        self._values: dict[str, list[int] | None] = {}

    def shape(self, name: str) -> Shape:
        """Of a tensor; () where it is not known, as for a scalar."""
        return self.shapes.get(name, ())

    def axis(self, name: str, axis: int) -> int:
        """An axis counted from the front."""
        return axis % max(len(self.shape(name)), 1)

    def size(self, name: str, axis: int) -> int | str | None:
        """Of one axis of a tensor."""
        shape = self.shape(name)
        return shape[axis] if 0 <= axis < len(shape) else None

    def numbers(self, name: str) -> list[int] | None:
        """The whole numbers of a small constant, flat; None for anything else."""
        if name not in self._values:
            tensor = self.initializers.get(name)
            node = self.made_by.get(name)
            if tensor is None and node is not None and node.op_type == "Constant":
                tensor = next((each.t for each in node.attribute if each.name == "value"), None)
            self._values[name] = None
            if tensor is not None and tensor.data_location != onnx.TensorProto.EXTERNAL \
                    and tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
                self._values[name] = [int(x) for x in numpy_helper.to_array(tensor).reshape(-1)]
        return self._values[name]

    def weight(self, name: str) -> bool:
        """Whether a tensor is an initializer."""
        return name in self.initializers


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """A whole-number attribute."""
    return next((each.i for each in node.attribute if each.name == name), default)


def attributes(node: onnx.NodeProto, name: str) -> list[int]:
    """A list of whole numbers; [] where there is none."""
    return list(next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), []))


def is_attention(node: onnx.NodeProto) -> bool:
    """Whether a node is the canonical attention op."""
    return node.op_type == attention_op.OP and node.domain == attention_op.DOMAIN


def label(node: onnx.NodeProto) -> str:
    """A node in messages."""
    return f"node {node.name!r} ({node.op_type})"
