"""NaN that a graph writes on purpose, for inputs that cannot be right (left padding), must reach the logits.

ONNX Runtime's product with int8 activations makes zeros of NaN. So a guard before a quantized product moves behind
it: `product(Where(good, x, NaN))` becomes `Where(good, product(x), NaN)`. A row of a product depends on its own input
alone.

Codes of float4 have no NaN either. The plugin's attention answers lengths that cannot be with NaN, which the residuals
carry past every other product: one that reads attention's answer, or gives the logits, is given a guard.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ... import attention_op, graph_io
from ...graph import edit, match
from ...graph.node_builder import Nodes
from .readers import Product

FAR = 64
"""nodes between a product and attention, or the logits, at most"""
PASSED = ("Unsqueeze", "Cast", "Reshape")


def behind(graph: gs.Graph, product: Product) -> Product:
    """The product without a guard before it, which then comes after it."""
    guard = match.producer(product.x)
    if match.is_op(guard, "Where"):
        place = next((index for index in (1, 2) if _is_nan(guard.inputs[index])), 0)
        hidden = guard.inputs[3 - place] if place else None
    elif match.is_op(guard, "Add"):
        place = next((index for index in (0, 1) if _is_penalty(guard.inputs[index])), -1)
        hidden = guard.inputs[1 - place] if place >= 0 else None
    else:
        return product
    if hidden is None:
        return product
    out = product.node.outputs[0]
    bare = gs.Variable(f"{product.node.name}.unguarded")
    product.node.outputs[0] = bare
    moved = [bare if each is hidden else each for each in guard.inputs]
    edit.add_node(graph, guard.op, moved, name=f"{guard.name}_behind_{product.node.name.rpartition('/')[2]}",
                  outputs=[out])
    places = [index for index, each in enumerate(product.node.inputs) if each is product.x]
    product.node.inputs[places[0]] = hidden
    return replace(product, x=hidden)


def hides_nan(graph: gs.Graph, product: Product) -> bool:
    """Whether NaN of attention goes through a product alone, and no residual carries it past."""
    if any(_is_attention(node) for node in _before(product.x)):
        return True
    return any(match.is_output(graph, tensor) and tensor.name == graph_io.LOGITS
               for tensor in _after(product.node)) and any(_is_attention(node) for node in graph.nodes)


def _is_attention(node: gs.Node) -> bool:
    return match.is_op(node, attention_op.OP, attention_op.DOMAIN)


def _before(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that a tensor is made of, back to sums, which are residuals."""
    found: list[gs.Node] = []
    front = [match.producer(tensor)]
    while front and len(found) < FAR:
        node = front.pop(0)
        if node is None or any(node is each for each in found) or node.op in ("Add", "Sum"):
            continue
        found.append(node)
        if not _is_attention(node):
            front += [match.producer(each) for each in node.inputs]
    return found


def _after(node: gs.Node) -> list[gs.Tensor]:
    """What is made of a node's results without another product."""
    found = list(node.outputs)
    for tensor in found:
        for reader in match.consumers(tensor) if len(found) < FAR else []:
            if reader.op not in ("MatMul", "Gemm"):
                found += [each for each in reader.outputs if all(each is not known for known in found)]
    return found


def carry_nan(graph: gs.Graph, product: Product, x: gs.Tensor, element: int) -> None:
    """Let rows of a product be NaN whose input has one. x: its input before it is rounded."""
    made = Nodes(graph, f"{product.node.name}/nan")
    there = made("there", "IsNaN", x)
    any_there = made("any", "ReduceMax", made("number", "Cast", there, to=onnx.TensorProto.INT32), [-1], keepdims=1)
    out, bare = product.node.outputs[0], gs.Variable(f"{product.node.name}.unguarded")
    product.node.outputs[0] = bare
    nan = edit.constant(f"{made.scope}/value", np.array(np.nan, np.float32), element)
    edit.add_node(graph, "Where", [made("row", "Cast", any_there, to=onnx.TensorProto.BOOL), nan, bare],
                  name=f"{made.scope}/guard", outputs=[out])


def _is_nan(tensor: gs.Tensor) -> bool:
    value = match.const_value(tensor)
    return value is not None and value.size == 1 and bool(np.isnan(value).all())


def _is_penalty(tensor: gs.Tensor) -> bool:
    """Whether a tensor is NaN for some rows and zero for the others."""
    node = match.producer(tensor)
    while node is not None and node.op in PASSED:
        node = match.producer(node.inputs[0])
    return match.is_op(node, "Where") and any(_is_nan(each) for each in node.inputs[1:])
