"""The weights of a traced model that can be quantized, by who reads them: products and the embedding.

Read from the canonical graph, never from names. A router's weights (a product whose result goes into TopK) stay as they
are: they are small, and a rounding there sends tokens to other experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..graph_io import INPUT_IDS, LOGITS, RECIPE
from ..weights.sources import recipe_of

if TYPE_CHECKING:
    import onnx

NEAR = 12
"""nodes between a router's product and TopK, at most"""


@dataclass(frozen=True)
class Weight:
    """A weight of two or three axes.

    Attributes:
        name: of the parameter.
        shape: as the graph has it.
        role: "linear", "head", "embedding" or "router"; "" where it cannot be quantized.
        reason: why not.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    reason: str = ""


def weights_of(model: onnx.ModelProto) -> list[Weight]:
    """Every weight of two axes or more of a canonical model, in the order of the graph. A tied head and embedding are
    a "head"."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, Weight] = {}
    for tensor in model.graph.initializer:
        name, shape = recipe_of(tensor).removeprefix(RECIPE), tuple(tensor.dims)
        if not name or "+" in name or len(shape) < 2:
            continue
        found[name] = _weight(name, shape, tensor.name, readers)
    return list(found.values())


def _weight(name: str, shape: tuple[int, ...], tensor: str, readers: dict[str, list[onnx.NodeProto]]) -> Weight:
    roles: set[str] = set()
    for node in readers.get(tensor, []):
        if node.op_type == "Gather" and node.input[0] == tensor and node.input[1] == INPUT_IDS:
            roles.add("embedding")
            continue
        products = readers.get(node.output[0], []) if node.op_type == "Transpose" else []
        if len(shape) != 2 or not products or any(
                each.op_type != "MatMul" or each.input[1] != node.output[0] for each in products):
            return Weight(name, shape, "", f"{node.op_type} reads it" if len(shape) == 2 else
                          f"it is a stack of {shape[0]} matrices, which {node.op_type} reads")
        roles.update(_role(each.output[0], readers) for each in products)
    for role in ("router", "head", "embedding", "linear"):
        if role in roles:
            return Weight(name, shape, role)
    return Weight(name, shape, "", "nothing reads it")


def _role(result: str, readers: dict[str, list[onnx.NodeProto]]) -> str:
    """What a product is for: where its result goes without another product."""
    front, seen = [result], {result}
    for _ in range(NEAR):
        following = []
        for name in front:
            if name == LOGITS:
                return "head"
            for node in readers.get(name, []):
                if node.op_type == "TopK":
                    return "router"
                if node.op_type in ("MatMul", "Gemm", "Einsum") or node.domain:
                    continue
                following += [out for out in node.output if out not in seen]
                seen.update(node.output)
        front = following
    return "linear"
