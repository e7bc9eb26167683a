"""Matrix products on weights as stored, [out, in]: com.microsoft::FusedMatMul(transB), and packed projections.

Source: onnxruntime docs/ContribOperators.md. Nothing is read: joined weights are a recipe, `weights:A+B+C`.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ...graph import edit
from ...graph.match import (
    const_value,
    consumers,
    is_op,
    is_weight,
    produced_by,
    producer,
    recipe,
    scalar,
    sole_consumer,
)
from ...graph.passes import NearMiss, Rewritten
from ..context import Context
from .attention import DOMAIN, OP


def transposed_products(graph: gs.Graph, context: Context) -> Rewritten:
    """MatMul(x, Transpose(weight)) -> FusedMatMul(x, weight, transB=1)."""
    count, misses = 0, []
    for node in graph.nodes:
        swap = produced_by(node.inputs[1], "Transpose") if is_op(node, "MatMul") else None
        if swap is None or not is_weight(swap.inputs[0]):
            continue
        if list(swap.attrs.get("perm", [1, 0])) != [1, 0]:
            misses.append(NearMiss(node.name, f"its weight is transposed by {list(swap.attrs['perm'])}, "
                                   "expected [1, 0]"))
            continue
        node.op, node.domain, node.inputs[1] = "FusedMatMul", DOMAIN, swap.inputs[0]
        node.name = node.name.replace("/MatMul_", "/FusedMatMul_")
        node.attrs = {"alpha": 1.0, "transA": 0, "transB": 1, "transBatchA": 0, "transBatchB": 0}
        count += 1
    edit.tidy(graph)
    return Rewritten(count, tuple(misses))


def pack_projections(graph: gs.Graph, context: Context) -> Rewritten:
    """One product for query, key and value where weights are copied anyway, or where they were one already."""
    if not context.target.packed_projections:
        return Rewritten(0)
    count, misses = 0, []
    for node in [node for node in graph.nodes if is_op(node, OP, DOMAIN)]:
        qkv = _joined_before(node)
        if qkv is None and context.options.packed:
            joined = _join(graph, node, context)
            if isinstance(joined, NearMiss):
                misses.append(joined)
            else:
                qkv = joined
        if qkv is not None:
            node.inputs[0] = qkv
            node.inputs[1], node.inputs[2] = gs.Variable.empty(), gs.Variable.empty()
            count += 1
    edit.tidy(graph)
    return Rewritten(count, tuple(misses))


def _joined_before(node: gs.Node) -> gs.Tensor | None:
    """The tensor [B, S, (H + 2K) * D] of which a node's query, key and value are the consecutive parts."""
    size = node.inputs[3].shape[3]
    heads, groups = node.attrs["num_heads"], node.attrs["kv_num_heads"]
    ends = [heads * size, (heads + groups) * size, (heads + 2 * groups) * size]
    sources = []
    for tensor, start, end in zip(node.inputs[:3], [0, *ends], ends):
        part = _part(tensor)
        if part is None or part[1] != start or (part[2] != end and not (end == ends[2] and part[2] > end)):
            return None
        sources.append(part[0])
    whole = sources[0]
    if any(source is not whole for source in sources) or not whole.shape or whole.shape[-1] != ends[2]:
        return None
    return whole


def _part(tensor: gs.Tensor) -> tuple[gs.Tensor, int, int] | None:
    """(whole, start, end) of a tensor that is a Slice or an output of a Split along the last of three axes."""
    node = producer(tensor)
    if is_op(node, "Slice") and len(node.inputs) >= 4:
        start, end, axis = (scalar(each) for each in node.inputs[1:4])
        step = scalar(node.inputs[4]) if len(node.inputs) > 4 else 1
        if axis in (2, -1) and step == 1 and start is not None and end is not None:
            return node.inputs[0], int(start), int(end)
    if is_op(node, "Split") and node.attrs.get("axis", 0) in (2, -1) and len(node.inputs) > 1:
        sizes = const_value(node.inputs[1])
        if sizes is not None:
            place = next(i for i, out in enumerate(node.outputs) if out is tensor)
            return node.inputs[0], int(sizes[:place].sum()), int(sizes[:place + 1].sum())
    return None


def _join(graph: gs.Graph, node: gs.Node, context: Context) -> gs.Tensor | NearMiss:
    """Join three products of one tensor, each with a weight of its own, all or none with a bias of its own."""
    products: list[gs.Node] = []
    biases: list[gs.Tensor | None] = []
    for name, tensor in zip(("query", "key", "value"), node.inputs):
        part = _product(graph, tensor)
        if isinstance(part, NearMiss):
            return NearMiss(part.node, f"{name}: {part.reason}")
        products.append(part[0])
        biases.append(part[1])
    for each in products[1:]:
        if each.inputs[0] is not products[0].inputs[0]:
            return NearMiss(each.name, f"it multiplies {each.inputs[0].name!r}, the projection of the query "
                            f"{products[0].inputs[0].name!r}")
    if any(bias is None for bias in biases) != all(bias is None for bias in biases):
        return NearMiss(node.name, "some of its projections have a bias and some have none")
    facts = [context.options.quantized.get(recipe(each.inputs[1])) for each in products]
    if any(facts) and not all(each is not None and each.alike(facts[0]) for each in facts):
        return NearMiss(node.name, "the weights of its projections are quantized in different ways")
    place = node.name.rpartition("/")[0]
    weight = _joined_weight(f"{place}.qkv.weight", [each.inputs[1] for each in products])
    qkv = edit.add_node(graph, "FusedMatMul", [products[0].inputs[0], weight], name=f"{place}.qkv/FusedMatMul_0",
                        domain=DOMAIN, attrs=dict(products[0].attrs))[0]
    if biases[0] is not None:
        bias = _joined_weight(f"{place}.qkv.bias", [bias for bias in biases if bias is not None])
        qkv = edit.add_node(graph, "Add", [qkv, bias], name=f"{place}.qkv/Add_0")[0]
    return qkv


def _product(graph: gs.Graph, tensor: gs.Tensor) -> tuple[gs.Node, gs.Tensor | None] | NearMiss:
    """(FusedMatMul, bias or None) behind a projection that nothing else reads; or where it is not one."""
    bias, node = None, producer(tensor)
    if node is None:
        return NearMiss(tensor.name, "no node computes it")
    if sole_consumer(graph, tensor) is None:
        return NearMiss(node.name, "other nodes read its result too")
    if is_op(node, "Add"):
        bias = next((each for each in node.inputs if is_weight(each)), None)
        inner = next((each for each in node.inputs if not is_weight(each)), None)
        if bias is None or inner is None or len(bias.shape) != 1:
            return NearMiss(node.name, "it does not add a bias that is stored as a vector")
        if sole_consumer(graph, inner) is None:
            return NearMiss(node.name, "other nodes read the product without its bias too")
        if not _own_weight(bias):
            return NearMiss(node.name, f"its bias {bias.name!r} is not its own")
        node = producer(inner) or node
    if not is_op(node, "FusedMatMul", DOMAIN):
        return NearMiss(node.name, f"it is {node.op}, expected the product with a stored matrix [out, in]")
    if not _own_weight(node.inputs[1]):
        return NearMiss(node.name, f"its weight {node.inputs[1].name!r} is not its own")
    return node, bias


def _own_weight(tensor: gs.Tensor) -> bool:
    return bool(recipe(tensor)) and len(consumers(tensor)) == 1


def _joined_weight(name: str, weights: list[gs.Tensor]) -> gs.Constant:
    rows = sum(weight.shape[0] for weight in weights)
    return edit.new_weight(name, "+".join(recipe(weight) for weight in weights), weights[0].dtype,
                           [rows, *weights[0].shape[1:]])


def silu(graph: gs.Graph, context: Context) -> Rewritten:
    """x * sigmoid(x) -> com.microsoft::QuickGelu(alpha=1), which ONNX Runtime would make of it when loading."""
    count, misses = 0, []
    for node in list(graph.nodes):
        gate = produced_by(node.inputs[0], "Sigmoid") or produced_by(node.inputs[1], "Sigmoid") \
            if is_op(node, "Mul") else None
        if gate is None:
            continue
        x = gate.inputs[0]
        if not any(each is x for each in node.inputs):
            continue
        if sole_consumer(graph, gate.outputs[0]) is None:
            misses.append(NearMiss(node.name, f"other nodes read {gate.name!r} too"))
            continue
        node.op, node.domain, node.attrs = "QuickGelu", DOMAIN, {"alpha": 1.0}
        node.inputs = [x]
        node.name = node.name.replace("/Mul_", "/QuickGelu_")
        count += 1
    return Rewritten(count, tuple(misses))
