"""What is cut: attention by heads, experts along their leading axis, then every pair of matrices between which nothing
but operators with a rule lies, and the head by rows of the vocabulary. H query heads, K key/value heads, R ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import onnx

from .. import attention_op, graph_io
from ..errors import UnsupportedModel
from ..spec import AttentionSpec, ModelSpec
from .facts import CannotShard, Cut, Parts, even, head_parts, held_heads
from .spread import Cuts
from .view import View, is_attention

CHOOSING = ("TopK", "ArgMax")
"""operators whose indices name experts"""
BETWEEN = ("Reshape", "Unsqueeze", "Squeeze", "Cast", "Clip", "Min", "Max", "Where", "Slice", "Flatten", "Expand",
           "Transpose", "Split", "Add", "Identity", "Less", "GreaterOrEqual")
"""operators that an index may pass on its way to the experts"""
FIX = "leave out --tensor-parallel, or serve the checkpoint with an engine that shards it (vLLM, SGLang)"


@dataclass
class Plan:
    """How a model is cut over ranks.

    Attributes:
        view: of the typed canonical model.
        spec: of the whole model.
        ranks: how many.
        cuts: by tensor.
        heads: of each layer, of each rank, the K/V heads it holds.
        head: the product whose columns are the vocabulary, where it is cut.
        vocabulary: of each rank, the rows of the head that it holds; () where the head is whole.
        whole: matrices that stay whole, and why.
        shared: matrices of keys and values whose heads every rank holds all.
    """

    view: View
    spec: ModelSpec
    ranks: int
    cuts: dict[str, Cut] = field(default_factory=dict)
    heads: dict[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    head: onnx.NodeProto | None = None
    vocabulary: Parts = ()
    whole: dict[str, str] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)

    def rank_spec(self, rank: int) -> ModelSpec:
        """What one rank's graph is."""
        return replace(self.spec, layers=tuple(
            replace(layer, num_heads=layer.num_heads // self.ranks, kv_num_heads=len(self.heads[layer.layer][rank]))
            for layer in self.spec.layers))


def plan_sharding(typed: onnx.ModelProto, spec: ModelSpec, ranks: int) -> Plan:
    """Decide what is cut.

    Args:
        typed: the canonical model with the shape of every value.
        spec: of that model.
        ranks: 2 or more.

    Raises:
        UnsupportedModel: the ranks do not divide the query heads of a layer, or an operator on an axis that is cut by
            heads has no rule.
    """
    plan = Plan(View(typed), spec, ranks)
    cuts = Cuts(plan.view)
    _attention(plan, cuts)
    cut_experts(plan, cuts)
    head = _head(plan)
    for node in plan.view.nodes:
        if node.op_type == "MatMul" and node is not head:
            _pair(plan, cuts, node)
    plan.cuts = cuts.known
    plan.whole = {name: why for name, why in plan.whole.items() if name not in plan.cuts}
    if head is not None:
        _cut_head(plan, head)
    return plan


def _attention(plan: Plan, cuts: Cuts) -> None:
    layers = {graph_io.past_names(layer.layer)[0]: layer for layer in plan.spec.layers}
    past = attention_op.input_index("past_key")
    for layer in plan.spec.layers:
        if layer.num_heads % plan.ranks:
            raise UnsupportedModel(f"{layer.num_heads} query heads cannot be cut over {plan.ranks} ranks evenly",
                                   f"layer {layer.layer}", "choose a --tensor-parallel that divides the query heads",
                                   code="E-MODEL-SHARD-HEADS")
        plan.heads[layer.layer] = held_heads(layer, plan.ranks)
    seeds: list[tuple[AttentionSpec, dict[str, Cut]]] = []
    for node in plan.view.nodes:
        if not is_attention(node):
            continue
        layer = layers[node.input[past]] if node.input[past] in layers else _borrowed(plan, node, layers)
        for place in (1, 2):
            if all(held == tuple(range(layer.kv_num_heads)) for held in plan.heads[layer.layer]):
                plan.shared |= _matrices_above(plan.view, node.input[place])
        seeds.append((layer, _seeds(plan, node, layer)))
    # All at once: layers may share a tensor (slopes, positions), and a layer that another's cut comes to first would be
    # taken apart before its own is known.
    reason = cuts.attempt(*(each for _, each in seeds))
    if reason is not None:
        where, reason = _first_refusal(plan, seeds, reason)
        raise UnsupportedModel(f"attention cannot be cut by heads: {reason.reason}",
                               f"{where}{f', {reason.node}' if reason.node else ''}", FIX,
                               code="E-MODEL-SHARD-RULE") from reason


def _first_refusal(plan: Plan, seeds: list[tuple[AttentionSpec, dict[str, Cut]]],
                   reason: CannotShard) -> tuple[str, CannotShard]:
    """The first layer that cannot be cut even alone, and why; `reason` where none is."""
    for layer, alone in seeds:
        why = Cuts(plan.view).attempt(alone)
        if why is not None:
            return f"layer {layer.layer}", why
    return "the layers together", reason


def _matrices_above(view: View, name: str) -> set[str]:
    """The weights of the products that a tensor is computed from, as far as the first."""
    found, waiting, seen = set[str](), [name], set[str]()
    while waiting:
        node = view.made_by.get(waiting.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        weight = weight_of(view, node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None:
            found.add(weight)
        else:
            waiting += list(node.input)
    return found


def _borrowed(plan: Plan, node: onnx.NodeProto, layers: dict[str, AttentionSpec]) -> AttentionSpec:
    """The layer whose present a node reads that has no cache of its own."""
    present = node.input[attention_op.input_index("past_key")]
    number = graph_io.layer_of_cache(present)
    for layer in layers.values():
        if layer.layer == number:
            return layer
    raise UnsupportedModel(f"attention reads {present!r}, which is not the cache of a layer", f"node {node.name!r}",
                           FIX, code="E-MODEL-SHARD-RULE")


def _seeds(plan: Plan, node: onnx.NodeProto, layer: AttentionSpec) -> dict[str, Cut]:
    """The cuts of a layer's attention node, by heads."""
    held = plan.heads[layer.layer]
    queries = tuple(tuple(range(r * layer.num_heads // plan.ranks, (r + 1) * layer.num_heads // plan.ranks))
                    for r in range(plan.ranks))
    parts = {"query": (queries, layer.head_size), "key": (held, layer.head_size),
             "value": (held, layer.value_head_size)}
    seeds = {}
    for name, (heads, size) in parts.items():
        tensor = node.input[attention_op.input_index(name)]
        if tensor:
            seeds[tensor] = Cut(2, head_parts(heads, size))
    seeds[node.output[0]] = Cut(2, head_parts(queries, layer.value_head_size))
    place = attention_op.input_index("sinks")
    if len(node.input) > place and node.input[place]:
        seeds[node.input[place]] = Cut(0, head_parts(queries, 1))
    return seeds


def cut_experts(plan: Plan, cuts: Cuts) -> None:
    """Matrices that are picked by a router's choice: each rank holds some of the experts, whole.

    Matrices of one choice are cut alike. Where one has more entries than another (LongCat's experts that compute
    nothing), those are never picked: the index would not be one of the other's.
    """
    picked: dict[str, list[str]] = {}
    for node in plan.view.nodes:
        if node.op_type in ("Gather", "GatherND") and node.input[0] in plan.view.initializers \
                and len(plan.view.shape(node.input[0])) > 1 and node.input[0] not in cuts.known:
            choice = _choice(plan.view, node.input[1])
            if choice is not None:
                picked.setdefault(choice, []).append(node.input[0])
    for matrices in picked.values():
        experts = min(int(str(plan.view.size(name, 0))) for name in matrices)
        for name in dict.fromkeys(matrices) if experts >= plan.ranks else ():
            reason = None if name in cuts.known else cuts.attempt({name: Cut(0, even(experts, plan.ranks))})
            if reason is not None:
                plan.whole[name] = str(reason)


def _choice(view: View, index: str) -> str | None:
    """The choice among experts that an index comes from; None where it comes from none."""
    waiting, seen = [index], set[str]()
    while waiting:
        name = waiting.pop()
        node = view.made_by.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type in CHOOSING:
            return name
        if node.op_type in BETWEEN:
            waiting += list(node.input)
    return None


def _pair(plan: Plan, cuts: Cuts, node: onnx.NodeProto) -> None:
    """Cut what a matrix sums over, if that can be followed back to the rows of others."""
    view = plan.view
    weights = [weight_of(view, name) for name in node.input[:2]]
    if sum(weight is not None for weight in weights) != 1:
        return
    place = 0 if weights[1] is not None else 1
    weight, values = weights[1 - place] or "", node.input[place]
    rank = len(view.shape(values))
    axis = rank - 1 if place == 0 else rank - 2
    size = view.size(values, axis)
    decided = weight in plan.shared or any(name in cuts.known for name in (weight, *node.input, *node.output))
    if decided or rank < 2 or not isinstance(size, int) or size < plan.ranks:
        return
    reason = cuts.attempt({values: Cut(axis, even(size, plan.ranks))})
    if reason is not None:
        plan.whole[weight] = str(reason)


def weight_of(view: View, name: str) -> str | None:
    """The initializer that a factor is made of alone: transposed, reshaped or picked from; None for other factors."""
    while name not in view.initializers:
        node = view.made_by.get(name)
        if node is None or node.op_type not in ("Transpose", "GatherND", "Gather", "Reshape", "Cast", "Split", "Slice",
                                                "Unsqueeze", "Squeeze"):
            return None
        name = node.input[0]
    return name


def _head(plan: Plan) -> onnx.NodeProto | None:
    """The product that gives the logits, what follows it working element by element."""
    view, name = plan.view, graph_io.LOGITS
    for _ in range(12):
        node = view.made_by.get(name)
        if node is None:
            return None
        if node.op_type == "MatMul":
            return node if weight_of(view, node.input[1]) is not None else None
        inputs = [each for each in node.input if each and each not in view.initializers and view.shape(each)]
        if node.op_type not in ("Add", "Cast", "Div", "Mul", "Tanh", "Identity", "Sub") or len(inputs) != 1:
            return None
        name = inputs[0]
    return None


def _cut_head(plan: Plan, node: onnx.NodeProto) -> None:
    """Rows of the vocabulary: as many on each rank, the last ranks' beginning earlier where they do not divide."""
    view, weight = plan.view, node.input[1]
    maker = view.made_by.get(weight)
    size = view.size(node.output[0], len(view.shape(node.output[0])) - 1)
    plain = maker is not None and maker.op_type == "Transpose" and maker.input[0] in view.initializers
    if not plain or not isinstance(size, int) or len(view.shape(node.output[0])) != 3 or node.output[0] in plan.cuts:
        plan.whole["the head"] = "its matrix is not one weight, transposed"
        return
    rows = -(-size // plan.ranks)
    if (plan.ranks - 1) * rows > size:
        plan.whole["the head"] = f"a vocabulary of {size} is too small for {plan.ranks} ranks"
        return
    plan.head = node
    plan.vocabulary = tuple(((min(r * rows, size - rows), min(r * rows, size - rows) + rows),)
                            for r in range(plan.ranks))
