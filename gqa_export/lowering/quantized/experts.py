"""Products with stacked experts become products of each expert with the rows that chose it, so that each is an ordinary
product with a weight, which the other passes know how to hold quantized.

Rows are sorted by their expert and split; an expert that no row chose multiplies no rows, so its codes are not read;
results are put back in order. That was measured on a CPU beside QMoE and beside picking codes by index
(docs/quantization.md): it is as fast as the first, is right for every gate, bias and routing, and is an order of
magnitude faster than the second.

Axes: E experts, P pairs of a token and an expert, T tokens, N and K rows and columns of an expert's matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from ...graph import edit
from ...graph.node_builder import Nodes
from ...graph.passes import Rewritten
from ...quantized.experts import expert_facts, expert_name
from ...quantized.facts import Form, MatrixFacts, bnb4_misfit, dequantize_form, float_form, nbits_form
from .expert_readers import ExpertProduct, find_experts
from .parts import keep_plain

if TYPE_CHECKING:
    from ..context import Context

NO_ENGINE = ("experts are chosen while the graph runs, and TensorRT takes neither a split into sizes that are computed "
             "nor codes that were picked by index")


def spread_experts(graph: gs.Graph, context: Context) -> Rewritten:
    """Every product with stacked quantized experts -> one of each expert; counts the products before."""
    found = find_experts(graph, context.quantized)
    rows, count = _Rows(graph), 0
    for name, facts in list(context.quantized.items()):
        products = found.get(name, "nothing in the graph reads this weight" if len(facts.shape) > 2 else [])
        if not products or (facts.kind in context.target.float_codes and isinstance(float_form(facts), Form)):
            continue  # one matrix, or a stack that the target dequantizes as it is
        reason = products if isinstance(products, str) else _reason(context, facts, products)
        del context.quantized[name]
        if reason or isinstance(products, str):
            keep_plain(context, name, reason)
            continue
        experts = products[0].experts
        context.quantized.update({expert_name(name, number, experts): expert_facts(facts, number, experts)
                                  for number in range(experts)})
        for product in products:
            _spread(graph, context, product, expert_facts(facts, 0, experts), rows)
        count += len(products)
    edit.tidy(graph)
    return Rewritten(count)


def _reason(context: Context, facts: MatrixFacts, products: list[ExpertProduct]) -> str:
    """Why a stack stays floating-point numbers; "" if it does not."""
    if context.target.engine:
        return NO_ENGINE
    if any(each.transposed != facts.transposed for each in products):
        return "its scales lie along the rows of its experts, and products sum over the columns"
    if len({each.experts for each in products}) > 1:
        return "its readers take it for different numbers of experts"
    single, target = expert_facts(facts, 0, products[0].experts), context.target
    form = nbits_form(single) if target.nbits else \
        dequantize_form(single, zeros=target.zero_points, blocks=target.quantized_blocks,
                        positive=target.positive_scales)
    return bnb4_misfit(form, context.element) if isinstance(form, Form) else form


class _Rows:
    """Rows sorted by their expert, made once for all products of one choice and one input."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self._orders: dict[tuple[int, int], tuple[gs.Tensor, gs.Tensor, gs.Tensor]] = {}
        self._split: dict[tuple[int, int, int], list[gs.Tensor]] = {}
        self._weights: dict[str, gs.Tensor] = {}
        self._kept: list[gs.Tensor] = []
        """ids of tensors that are gone would be given again"""

    def order(self, product: ExpertProduct, scope: str) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
        """Of the pairs of a choice: their order by expert, where each is then, and how many each expert has."""
        ids = product.ids
        assert ids is not None
        key = (id(ids), product.experts)
        if key not in self._orders:
            node = Nodes(self.graph, f"{scope}/rows")
            flat = ids if product.flat else node("flat", "Reshape", ids, [-1])
            count = node("count", "Shape", flat)
            none = edit.constant(f"{scope}/rows/none", np.zeros(product.experts, np.int64))
            one = edit.constant(f"{scope}/rows/one", np.array(1, np.int64))
            ones = node("ones", "Expand", one, count)
            sizes = node("sizes", "ScatterElements", none, flat, ones, axis=0, reduction="add")
            order = self._sorted(f"{scope}/rows/sorted", flat, count)
            self._orders[key] = (order, self._sorted(f"{scope}/rows/back", order, count), sizes)
            self._kept.append(ids)
        return self._orders[key]

    def _sorted(self, name: str, values: gs.Tensor, count: gs.Tensor) -> gs.Tensor:
        """Places of values in rising order. values int64 `[P]`; count: P, `[1]`."""
        return edit.add_node(self.graph, "TopK", [values, count], name=name, outputs=2,
                             attrs={"axis": 0, "largest": 0, "sorted": 1})[1]

    def of_experts(self, product: ExpertProduct, columns: int, element: int, scope: str) -> list[gs.Tensor]:
        """The rows of each expert: `[rows, K]`, or `[1, T, K]` where every expert has rows of its own."""
        key = (id(product.x), id(product.ids), product.experts)
        if key not in self._split:
            outs = [gs.Variable(f"{scope}/rows_of/{number}", dtype=element) for number in range(product.experts)]
            if product.ids is None:
                x, sizes = product.x, edit.constant(f"{scope}/rows/each", np.ones(product.experts, np.int64))
            else:
                order, _, sizes = self.order(product, scope)
                node = Nodes(self.graph, f"{scope}/input")
                x = node("sorted", "Gather", self._flat(node, product, columns), order, axis=0)
                for out in outs:
                    out.shape = [None, columns]
            edit.add_node(self.graph, "Split", [x, sizes], name=f"{scope}/rows_of", outputs=outs, attrs={"axis": 0})
            self._split[key] = outs
            self._kept.append(product.x)
        return self._split[key]

    def weight(self, name: str, element: int, shape: Sequence[int]) -> gs.Tensor:
        """An expert's matrix as `[K, N]`, made once. shape: `[N, K]`."""
        if name not in self._weights:
            weight = edit.new_weight(name, name, element, shape)
            self._weights[name] = Nodes(self.graph, name)("swapped", "Transpose", weight, perm=[1, 0])
        return self._weights[name]

    @staticmethod
    def _flat(node: Nodes, product: ExpertProduct, columns: int) -> gs.Tensor:
        """x as `[P, K]`."""
        if product.flat:
            return product.x
        whole = node("shape", "Concat", node("ids", "Shape", product.ids), [columns], axis=0)
        return node("flat", "Reshape", node("expanded", "Expand", product.x, whole), [-1, columns])


def _spread(graph: gs.Graph, context: Context, product: ExpertProduct, facts: MatrixFacts, rows: _Rows) -> None:
    node, (count, columns) = product.node, facts.shape
    place, _, number = node.name.rpartition("_")
    scope = f"{place.rpartition('/')[0]}/{product.name.rpartition('.')[2]}_{number}"
    parts = rows.of_experts(product, columns, context.element, scope)
    out, results = node.outputs[0], []
    for expert, part in enumerate(parts):
        name = expert_name(product.name, expert, product.experts)
        weight = rows.weight(name, context.element, facts.shape)
        results += edit.add_node(graph, "MatMul", [part, weight], name=f"{name}/MatMul_{number}")
    edit.remove(node)
    if product.ids is None:
        edit.add_node(graph, "Concat", results, name=f"{scope}/together", outputs=[out], attrs={"axis": 0})
        return
    made = Nodes(graph, scope)
    _, back, _ = rows.order(product, scope)
    whole = made("in_order", "Gather", made("together", "Concat", *results, axis=0), back, axis=0)
    if product.flat:
        axes = edit.constant(f"{scope}/axes", np.array([1 if product.columns_last else -1]))
        edit.add_node(graph, "Unsqueeze", [whole, axes], name=f"{scope}/whole", outputs=[out])
        return
    tail = [1, count] if product.columns_last else [count, 1]
    shape = made("shape", "Concat", made("ids", "Shape", product.ids), tail, axis=0)
    edit.add_node(graph, "Reshape", [whole, shape], name=f"{scope}/whole", outputs=[out])


