"""The weights of a traced model that can be quantized, by who reads them: products and the embedding.

Read from the canonical graph, never from names. A router's weights (a product whose result goes into TopK) stay as they
are: they are small, and a rounding there sends tokens to other experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx import numpy_helper

from ..graph_io import INPUT_IDS, LOGITS, RECIPE
from ..quantized.experts import stack_in
from ..weights.sources import recipe_of

if TYPE_CHECKING:
    import onnx

INT64 = 7
"""ONNX's number of the type"""
GEMM = {"alpha": 1, "beta": 1, "transA": 0, "transB": 0}
"""attributes of Gemm as they are where they are left out"""
NEAR = 12
"""nodes between a router's product and TopK, at most"""


@dataclass(frozen=True)
class Weight:
    """A weight of two or three axes.

    Attributes:
        name: of the parameter.
        shape: as the graph has it.
        role: "linear", "head", "embedding", "router" or "experts"; "" where it cannot be quantized.
        reason: why not.
        experts: matrices that are stacked in it; 0: it is one.
        transposed: products sum over the last axis but one.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    reason: str = ""
    experts: int = 0
    transposed: bool = False

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """`[N, K]`, of experts `[E, N, K]`: products sum over K."""
        return stack_shape(self.shape, self.experts, transposed=self.transposed) if self.experts else self.shape


def stack_shape(shape: Sequence[int], experts: int, *, transposed: bool) -> tuple[int, int, int]:
    """`[E, N, K]` of a parameter that has experts as `[E, ..]` or one below the other; transposed: each as `[K, N]`."""
    rows, columns = shape[-2] if len(shape) > 2 else shape[0] // experts, shape[-1]
    return (experts, columns, rows) if transposed else (experts, rows, columns)


def weights_of(model: onnx.ModelProto) -> list[Weight]:
    """Every weight of two axes or more of a canonical model, in the order of the graph. A tied head and embedding are
    a "head"."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    sizes = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == INT64}
    found: dict[str, Weight] = {}
    for tensor in model.graph.initializer:
        name, shape = recipe_of(tensor).removeprefix(RECIPE), tuple(tensor.dims)
        if not name or "+" in name or len(shape) < 2:
            continue
        found[name] = _weight(name, shape, tensor.name, readers, sizes)
    return list(found.values())


def _weight(name: str, shape: tuple[int, ...], tensor: str, readers: dict[str, list[onnx.NodeProto]],
            sizes: Mapping[str, onnx.TensorProto]) -> Weight:
    stack = _stack(shape, tensor, readers, sizes)
    if stack is not None:
        return Weight(name, shape, "experts", "", *stack)
    roles: set[str] = set()
    for node in readers.get(tensor, []):
        if node.op_type == "Gather" and node.input[0] == tensor and node.input[1] == INPUT_IDS:
            roles.add("embedding")
            continue
        products = readers.get(node.output[0], []) if node.op_type == "Transpose" else []
        if node.op_type == "Gemm" and is_product(node, tensor):
            products = [node]
        elif any(each.op_type != "MatMul" or each.input[1] != node.output[0] for each in products):
            products = []
        if len(shape) != 2 or not products:
            return Weight(name, shape, "", f"{node.op_type} reads it" if len(shape) == 2 else
                          f"it is a stack of {shape[0]} matrices, which {node.op_type} reads")
        roles.update(_role(each.output[0], readers) for each in products)
    for role in ("router", "head", "embedding", "linear"):
        if role in roles:
            return Weight(name, shape, role)
    return Weight(name, shape, "", "nothing reads it")


def is_product(gemm: onnx.NodeProto, weight: str) -> bool:
    """Whether a Gemm is `x @ W^T`, or that plus a bias."""
    facts = {each.name: each.f if each.type == each.FLOAT else each.i for each in gemm.attribute}
    return gemm.input[1] == weight and gemm.input[0] != weight and {**GEMM, **facts} == {**GEMM, "transB": 1}


def _stack(shape: tuple[int, ...], tensor: str, readers: dict[str, list[onnx.NodeProto]],
           sizes: Mapping[str, onnx.TensorProto]) -> tuple[int, bool] | None:
    """How many matrices are stacked in a weight, and whether each is transposed: what products say that pick some of
    them by index, or take all; None where it is read otherwise. Whether their inputs are rows of each expert is the
    lowering's to say, which knows more of shapes: a stack stays floating-point numbers there."""
    found = {each for node in readers.get(tensor, []) for each in _stacks(shape, tensor, node, readers, sizes, False)}
    return found.pop() if len(found) == 1 and None not in found else None


def _stacks(shape: tuple[int, ...], tensor: str, node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]],
            sizes: Mapping[str, onnx.TensorProto], swapped: bool) -> Iterator[tuple[int, bool] | None]:
    """What the products behind one reader say."""
    behind = readers.get(node.output[0], [])
    if node.op_type == "Reshape" and node.input[1] in sizes:
        stack = stack_in(shape, numpy_helper.to_array(sizes[node.input[1]]).tolist())
        if stack is not None:
            for each in behind:
                yield from _stacks(stack, node.output[0], each, readers, sizes, swapped)
            return
    perm = next((list(each.ints) for each in node.attribute if each.name == "perm"), [])
    if node.op_type == "Transpose" and perm == [0, 2, 1]:
        for each in behind:
            yield from _stacks(shape, node.output[0], each, readers, sizes, not swapped)
    elif node.op_type == "MatMul" and len(shape) == 3 and node.input[1] == tensor:
        yield shape[0], not swapped
    elif node.op_type in ("Gather", "GatherND") and len(shape) == 3 and node.input[0] == tensor and behind:
        for each in behind:
            first = each.input[0] == node.output[0]
            yield (shape[0], swapped == first) if each.op_type == "MatMul" else None
    else:
        yield None


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
