"""NaN that a graph writes on purpose, for inputs that cannot be right (left padding), must reach the logits.

ONNX Runtime's product with int8 activations makes zeros of NaN. So a guard before a quantized product moves behind
it: `product(Where(good, x, NaN))` becomes `Where(good, product(x), NaN)`. A row of a product depends on its own input
alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from ...graph import edit, match
from .readers import Product

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


def _is_nan(tensor: gs.Tensor) -> bool:
    value = match.const_value(tensor)
    return value is not None and value.size == 1 and bool(np.isnan(value).all())


def _is_penalty(tensor: gs.Tensor) -> bool:
    """Whether a tensor is NaN for some rows and zero for the others."""
    node = match.producer(tensor)
    while node is not None and node.op in PASSED:
        node = match.producer(node.inputs[0])
    return match.is_op(node, "Where") and any(_is_nan(each) for each in node.inputs[1:])
