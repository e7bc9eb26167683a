"""Looking around in a graphsurgeon graph: producers, consumers, constants.

graphsurgeon reads a lazy constant as soon as its `.values` is touched, resolving the file against the working
directory; everything here goes through `const_value`, which never reads one that lives outside the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from ..errors import GqaExportError
from ..graph_io import RECIPE


def is_op(node: gs.Node | None, op: str, domain: str = "") -> TypeGuard[gs.Node]:
    """Whether `node` is there and is `domain`::`op`."""
    return node is not None and node.op == op and (node.domain or "") == domain


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node a tensor comes from; None for graph inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def produced_by(tensor: gs.Tensor, op: str, domain: str = "") -> gs.Node | None:
    """The node a tensor comes from if it is `domain`::`op`, else None."""
    node = producer(tensor)
    return node if is_op(node, op, domain) else None


def consumers(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that read a tensor, each once."""
    found: dict[int, gs.Node] = {id(node): node for node in tensor.outputs}
    return list(found.values())


def sole_consumer(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The one node that reads a tensor; None if there are more or fewer, or if it is also a graph output."""
    nodes = consumers(tensor)
    return nodes[0] if len(nodes) == 1 and not is_output(graph, tensor) else None


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether a tensor is an output of the graph."""
    return any(tensor is output for output in graph.outputs)


def is_weight(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant whose bytes live outside the graph."""
    if not isinstance(tensor, gs.Constant) or not isinstance(tensor._values, LazyValues):
        return False
    return tensor._values.tensor.data_location == onnx.TensorProto.EXTERNAL


def recipe(tensor: gs.Tensor) -> str:
    """The weight recipe of a constant without its prefix (`NAME` or `A+B+C`); "" if it is not such a weight."""
    if not is_weight(tensor):
        return ""
    entries = {entry.key: entry.value for entry in tensor._values.tensor.external_data}
    location = entries.get("location", "")
    return location.removeprefix(RECIPE) if location.startswith(RECIPE) else ""


def const_value(tensor: gs.Tensor) -> np.ndarray | None:
    """The value of a constant that lives in the graph (bf16 as fp32), never that of a weight; else None."""
    if is_weight(tensor):
        return None
    if isinstance(tensor, gs.Constant):
        values = tensor._values
        value = onnx.numpy_helper.to_array(values.tensor) if isinstance(values, LazyValues) else values
    else:
        node = produced_by(tensor, "Constant")
        if node is None:
            return None
        if "value" in node.attrs:
            return const_value(node.attrs["value"])
        return np.asarray(next(iter(node.attrs.values())))
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


def scalar(tensor: gs.Tensor) -> float | int | None:
    """The one number a constant holds; None if it is not a constant or holds more."""
    value = const_value(tensor)
    return value.reshape(-1)[0].item() if value is not None and value.size == 1 else None


def is_scalar(tensor: gs.Tensor, number: float) -> bool:
    """Whether a tensor is a constant that holds just `number`."""
    return scalar(tensor) == number


def upstream(outputs: Iterable[gs.Tensor], stop: Iterable[gs.Tensor] = ()) -> tuple[list[gs.Node], list[gs.Tensor]]:
    """All nodes that `outputs` are computed from (producers first), not looking beyond `stop`, and the dynamic
    tensors met at the border: the `stop` tensors in use and graph inputs."""
    stops = {id(tensor) for tensor in stop}
    order: list[gs.Node] = []
    border: list[gs.Tensor] = []
    seen: set[int] = set()
    stack: list[tuple[gs.Tensor | gs.Node, bool]] = [(tensor, False) for tensor in reversed(list(outputs))]
    while stack:
        item, done = stack.pop()
        if done:
            order.append(item)
            continue
        if isinstance(item, gs.Node):
            if id(item) not in seen:
                seen.add(id(item))
                stack.append((item, True))
                stack.extend((tensor, False) for tensor in reversed(list(item.inputs)))
        elif id(item) in stops or (not isinstance(item, gs.Constant) and not item.inputs and item.name):
            if id(item) not in seen:
                seen.add(id(item))
                border.append(item)
        elif item.inputs:
            stack.append((item.inputs[0], False))
    return order, border


def only_input(graph: gs.Graph, name: str) -> gs.Variable:
    """The graph input `name`.

    Raises:
        GqaExportError: the graph has none of this name.
    """
    for tensor in graph.inputs:
        if tensor.name == name:
            return tensor
    raise GqaExportError(f"the graph has no input {name!r}, it has {[each.name for each in graph.inputs][:8]}",
                         f"graph {graph.name!r}", "pass a canonical model made by this version of gqa-export",
                         code="E-GRAPH-INPUT")
