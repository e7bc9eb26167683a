"""Targets of standard operators: DequantizeLinear before MatMul and Gather.

ONNX Runtime makes MatMulNBits of DequantizeLinear (axis 0 of a weight `[K, N]`) and MatMul when it loads a graph.
TensorRT takes codes around 0 alone, so zero points and minima become sums of the input's blocks times what each block
adds. Source: onnx docs/Operators.md (DequantizeLinear-21) and runs of ONNX Runtime 1.31 and TensorRT-RTX 1.7.
"""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from ...graph import edit
from ...graph.node_builder import Nodes
from ...graph.passes import Rewritten
from ...quantized.facts import Form, dequantize_form
from ..context import Context
from .inputs import Inputs
from .nan_guards import behind
from .parts import Parts, hold, keep_plain
from .readers import Product, find_readers, without_bias

ELEMENTS = {"int4": onnx.TensorProto.INT4, "uint4": onnx.TensorProto.UINT4, "int8": onnx.TensorProto.INT8,
            "uint8": onnx.TensorProto.UINT8}


def quantize_graph(graph: gs.Graph, context: Context) -> Rewritten:
    """Every product and lookup of a quantized weight -> DequantizeLinear before it; counts them."""
    quantized, target = context.quantized, context.target
    readers = find_readers(graph, quantized)
    looked_up = {lookup.name for lookup in readers.lookups}
    forms: dict[str, Form] = {}
    plain = dict(readers.misfits)
    for name, facts in quantized.items():
        form = dequantize_form(facts, zeros=target.zero_points, blocks=target.quantized_blocks,
                               columns_first=name not in looked_up)
        if isinstance(form, Form) and name in looked_up and (
                form.shift or facts.column_order is not None or facts.column_scale is not None):
            form = "its rows are looked up, and its blocks have minima or its columns an order of their own"
        if isinstance(form, str):
            plain.setdefault(name, form)
        else:
            forms[name] = form
    for name, reason in plain.items():
        keep_plain(context, name, reason)
    parts, inputs = Parts(graph, context), Inputs(graph, context)
    weights = _Weights(graph, context, parts)
    products = [behind(graph, without_bias(graph, each)) for each in readers.products
                if not any(name in plain for name in each.names)]
    lookups = [each for each in readers.lookups if each.name not in plain]
    for product in products:
        _product(graph, context, product, forms[product.names[0]], weights, inputs)
    for lookup in lookups:
        hold(context, (lookup.name,), forms[lookup.name])
        lookup.node.inputs[0] = weights(lookup.name, forms[lookup.name])
    edit.tidy(graph)
    return Rewritten(len(products) + len(lookups))


class _Weights:
    """DequantizeLinear of each weight, once."""

    def __init__(self, graph: gs.Graph, context: Context, parts: Parts) -> None:
        self.graph, self.context, self.parts = graph, context, parts
        self._made: dict[str, gs.Tensor] = {}

    def __call__(self, name: str, form: Form) -> gs.Tensor:
        """The weight as numbers of the model's type: `[K, N]` where the form has columns first, else `[N, K]`."""
        if name not in self._made:
            rows, columns = self.context.quantized[name].shape
            blocks = columns // form.block
            whole = [columns, rows] if form.columns_first else [rows, columns]
            ins: list[gs.Tensor | None] = [
                self.parts((name,), form, "codes", ELEMENTS[f"{'' if form.signed else 'u'}int{form.bits}"], whole),
                self.scale(name, form)]
            if form.zeros:
                ins.append(self.parts((name,), form, "zero", ELEMENTS[f"uint{form.bits}"],
                                      [blocks, rows] if form.columns_first else [rows, blocks]))
            axis = 0 if form.columns_first else 1
            self._made[name] = edit.add_node(self.graph, "DequantizeLinear", ins, name=f"{name}/DequantizeLinear",
                                             attrs={"axis": axis, "block_size": form.block})[0]
        return self._made[name]

    def scale(self, name: str, form: Form) -> gs.Tensor:
        """Its scales."""
        return self.parts.number((name,), form, "scale", self.blocks(name, form))

    def blocks(self, name: str, form: Form) -> list[int]:
        """The shape of its scales."""
        rows, columns = self.context.quantized[name].shape
        shape = [rows, columns // form.block]
        return shape[::-1] if form.columns_first else shape


def _product(graph: gs.Graph, context: Context, product: Product, form: Form, weights: _Weights,
             inputs: Inputs) -> None:
    (name,), node = product.names, product.node
    facts, out = context.quantized[name], node.outputs[0]
    scope = node.name.rpartition("/")[0]
    hold(context, (name,), form)
    node.inputs[0] = x = inputs.ordered(product.x, facts, scope)
    weight = weights(name, form)
    builder = Nodes(graph, f"{scope}/weight")
    node.inputs[1] = weight if form.columns_first else builder("swapped", "Transpose", weight, perm=[1, 0])
    if form.shift:
        symmetric = gs.Variable(f"{node.name}.symmetric")
        node.outputs[0] = symmetric
        shift = weights.parts.shift((name,), form, facts.offset, weights.scale(name, form), weights.blocks(name, form))
        if not form.columns_first:
            shift = builder("shift_swapped", "Transpose", shift, perm=[1, 0])
        added = builder("shift", "MatMul", inputs.sums(x, facts.columns, form.block, scope), shift)
        edit.add_node(graph, "Add", [symmetric, added], name=f"{scope}/shift/Add", outputs=[out])
