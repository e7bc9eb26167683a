"""Who reads a quantized weight: products `x @ W^T` and lookups `W[ids]`; anything else needs floating-point numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from ...graph import edit, match
from ...quantized.facts import MatrixFacts

CONTRIB = "com.microsoft"


@dataclass(frozen=True, eq=False)
class Product:
    """`output = x @ W^T`.

    Attributes:
        node: that computes it: MatMul, FusedMatMul or Gemm, which may add a bias.
        x: `[..., K]`.
        names: of the weights whose rows are W's, in order.
    """

    node: gs.Node
    x: gs.Tensor
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Lookup:
    """`output = W[ids]`. name: of the weight W."""

    node: gs.Node
    ids: gs.Tensor
    name: str


@dataclass
class Readers:
    """Every reader of quantized weights. misfits: name of a weight -> who reads it otherwise. others: the tensors of
    single weights that are read otherwise."""

    products: list[Product]
    lookups: list[Lookup]
    misfits: dict[str, str]
    others: list[gs.Tensor]


def find_readers(graph: gs.Graph, quantized: Mapping[str, MatrixFacts]) -> Readers:
    """The readers of all weights in `quantized`."""
    found = Readers([], [], {}, [])
    for tensor in {id(t): t for node in graph.nodes for t in node.inputs if match.is_weight(t)}.values():
        names = tuple(match.recipe(tensor).split("+"))
        known = [name for name in names if name in quantized]
        if not known:
            continue
        facts = quantized[known[0]]
        if len(known) < len(names) or not all(facts.alike(quantized[name]) for name in names[1:]):
            found.misfits.update((name, "its rows are joined with others of another form") for name in known)
            continue
        for node in match.consumers(tensor):
            found_one = _reader(graph, node, tensor, names)
            if isinstance(found_one, str):
                found.misfits.update((name, found_one) for name in names)
                if len(names) == 1 and all(tensor is not known for known in found.others):
                    found.others.append(tensor)
            elif isinstance(found_one, Lookup):
                found.lookups.append(found_one)
            else:
                found.products.extend(found_one)
    return found


def _reader(graph: gs.Graph, node: gs.Node, tensor: gs.Tensor, names: tuple[str, ...]) -> list[Product] | Lookup | str:
    if match.is_op(node, "Gather") and node.inputs[0] is tensor and node.attrs.get("axis", 0) == 0 and len(names) == 1:
        return Lookup(node, node.inputs[1], names[0])
    if match.is_op(node, "FusedMatMul", CONTRIB) and node.inputs[1] is tensor and node.inputs[0] is not tensor:
        plain = {"alpha": 1.0, "transA": 0, "transBatchA": 0, "transBatchB": 0}
        if node.attrs.get("transB") == 1 and all(node.attrs.get(key, value) == value for key, value in plain.items()):
            return [Product(node, node.inputs[0], names)]
    if match.is_op(node, "Gemm") and node.inputs[1] is tensor and node.inputs[0] is not tensor:
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        if node.attrs.get("transB") == 1 and all(node.attrs.get(key, value) == value for key, value in plain.items()):
            return [Product(node, node.inputs[0], names)]
    if match.is_op(node, "Transpose") and list(node.attrs.get("perm", [1, 0])) == [1, 0] and len(tensor.shape) == 2:
        swapped = node.outputs[0]
        readers = match.consumers(swapped)
        if readers and not match.is_output(graph, swapped) and all(
                match.is_op(each, "MatMul") and each.inputs[1] is swapped and each.inputs[0] is not swapped
                for each in readers):
            return [Product(each, each.inputs[0], names) for each in readers]
    return f"{node.op} reads it"


def without_bias(graph: gs.Graph, product: Product) -> Product:
    """The product as a MatMul, with an Add behind it where a Gemm adds a bias. Its weight must be replaced."""
    node = product.node
    if match.is_op(node, "Gemm"):
        node.op, node.attrs = "MatMul", {}
        node.name = node.name.replace("/Gemm_", "/MatMul_")
        if len(node.inputs) > 2:
            out, bare, bias = node.outputs[0], gs.Variable(f"{node.name}.bare"), node.inputs[2]
            node.outputs[0] = bare
            del node.inputs[2]
            edit.add_node(graph, "Add", [bare, bias], name=f"{node.name}/Add", outputs=[out])
    return product
