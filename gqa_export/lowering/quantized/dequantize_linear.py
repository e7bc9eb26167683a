"""Targets of standard operators: DequantizeLinear before MatMul and Gather.

ONNX Runtime makes MatMulNBits of DequantizeLinear (axis 0 of a weight `[K, N]`) and MatMul when it loads a graph, if
nothing else reads the codes, the scales or their product, so every product of a matrix has initializers of its own, of
the same bytes, and what follows is spelled so that it does not stand in the way (`clamps`).
TensorRT takes codes around 0 alone, so zero points and minima become sums of the input's blocks times what each block
adds. It takes codes of float8 and float4 as they are: they are dequantized in float32, with scales of float32 or, of
NVFP4, of e4m3 under one of float32, and cast to the graph's type: the values are those of the checkpoint, rounded once.
Source: onnx docs/Operators.md (DequantizeLinear-21) and runs of ONNX Runtime 1.31 and TensorRT-RTX 1.7.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import onnx
import onnx_graphsurgeon as gs

from ...graph import edit, match
from ...graph.node_builder import Nodes
from ...graph.passes import Rewritten
from ...quantized.facts import E4M3, Form, dequantize_form, float_form
from ..context import Context
from .clamps import spell_clamp
from .inputs import Inputs
from .nan_guards import behind, carry_nan, hides_nan
from .parts import Parts, hold, keep_plain
from .readers import Product, find_readers, without_bias

ELEMENTS = {"int4": onnx.TensorProto.INT4, "uint4": onnx.TensorProto.UINT4, "int8": onnx.TensorProto.INT8,
            "uint8": onnx.TensorProto.UINT8, "e4m3": onnx.TensorProto.FLOAT8E4M3FN,
            "e2m1": onnx.TensorProto.FLOAT4E2M1}
SCALES = {E4M3: onnx.TensorProto.FLOAT8E4M3FN, "float16": onnx.TensorProto.FLOAT16,
          "bfloat16": onnx.TensorProto.BFLOAT16, "float32": onnx.TensorProto.FLOAT}


def quantize_graph(graph: gs.Graph, context: Context) -> Rewritten:
    """Every product and lookup of a quantized weight -> DequantizeLinear before it; counts them."""
    quantized, target = context.quantized, context.target
    readers = find_readers(graph, quantized)
    looked_up = {lookup.name for lookup in readers.lookups}
    forms: dict[str, Form] = {}
    plain, others = dict(readers.misfits), {match.recipe(tensor): tensor for tensor in readers.others}
    for name, facts in quantized.items():
        if facts.kind in target.float_codes:
            numbers = float_form(facts)
            own = facts.column_order is not None or facts.column_scale is not None
            if isinstance(numbers, str):
                plain.setdefault(name, numbers)
            elif own and name in {*looked_up, *others}:
                plain.setdefault(name, "its columns have an order or scales of their own")
            else:
                forms[name] = numbers
                if name in others:
                    del plain[name]
            continue
        form = dequantize_form(facts, zeros=target.zero_points, blocks=target.quantized_blocks,
                               columns_first=name not in looked_up, positive=target.positive_scales)
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
    others = {name: tensor for name, tensor in others.items() if name not in plain}
    for name, tensor in others.items():
        hold(context, (name,), forms[name])
        edit.replace_uses(graph, tensor, weights(name, forms[name]))
    edit.tidy(graph)
    return Rewritten(len(products) + len(lookups) + len(others))


class _Weights:
    """DequantizeLinear of each weight, once."""

    def __init__(self, graph: gs.Graph, context: Context, parts: Parts) -> None:
        self.graph, self.context, self.parts = graph, context, parts
        self._made: dict[str, gs.Tensor] = {}
        self._products: Counter[str] = Counter()

    def of_product(self, name: str, form: Form) -> gs.Tensor:
        """The weight as `__call__` gives it, for one product alone where ONNX Runtime makes one operator of both."""
        if form.kind != "int" or not form.columns_first or self.context.target.engine:
            return self(name, form)
        self._products[name] += 1
        return self(name, form, self._products[name] - 1)

    def __call__(self, name: str, form: Form, copy: int = 0) -> gs.Tensor:
        """The weight as numbers of the model's type: `[K, N]` where the form has columns first, else `[N, K]`; as the
        model has it where its codes are floating-point numbers. copy: which of several."""
        if name not in self._made and form.kind != "int":
            self._made[name] = self._numbers(name, form)
        label = f"{name}.{copy}" if copy else name
        if label not in self._made:
            rows, columns = self.context.quantized[name].shape
            blocks = columns // form.block
            whole = [columns, rows] if form.columns_first else [rows, columns]
            ins: list[gs.Tensor | None] = [
                self.parts((name,), form, "codes", ELEMENTS[f"{'' if form.signed else 'u'}int{form.bits}"], whole,
                           copy=copy),
                self.scale(name, form, copy)]
            if form.zeros:
                ins.append(self.parts((name,), form, "zero", ELEMENTS[f"uint{form.bits}"],
                                      [blocks, rows] if form.columns_first else [rows, blocks], copy=copy))
            axis = 0 if form.columns_first else 1
            self._made[label] = edit.add_node(self.graph, "DequantizeLinear", ins, name=f"{label}/DequantizeLinear",
                                              attrs={"axis": axis, "block_size": form.block})[0]
        return self._made[label]

    def _numbers(self, name: str, form: Form) -> gs.Tensor:
        """A weight whose codes are floating-point numbers, in the model's type and with the model's axes."""
        facts, node = self.context.options.quantized[name], Nodes(self.graph, name)
        shape = list(facts.shape)
        scales = {"tensor": [], "row": shape[:-1], "block": [*shape[:-1], facts.columns // form.block]}[form.per]
        codes = self.parts((name,), form, "codes", ELEMENTS[form.kind], shape)
        scale = self.parts((name,), form, "scale", SCALES[form.scales], scales)
        if form.scales == E4M3:
            whole = self.parts((name,), form, "global", onnx.TensorProto.FLOAT, [])
            scale = node("scale", "DequantizeLinear", scale, whole)
        elif form.scales != "float32":
            scale = node("scale", "Cast", scale, to=onnx.TensorProto.FLOAT)
        axis = {"tensor": {}, "row": {"axis": 0},
                "block": {"axis": len(shape) - 1, "block_size": form.block}}[form.per]
        made = edit.add_node(self.graph, "DequantizeLinear", [codes, scale], name=f"{name}/DequantizeLinear",
                             attrs=axis)[0]
        if self.context.element != onnx.TensorProto.FLOAT:
            made = node("cast", "Cast", made, to=self.context.element)
        if facts.transposed:
            last = len(shape) - 1
            made = node("exchanged", "Transpose", made, perm=[*range(last - 1), last, last - 1])
        return made

    def scale(self, name: str, form: Form, copy: int = 0) -> gs.Tensor:
        """Its scales."""
        return self.parts.number((name,), form, "scale", self.blocks(name, form), copy=copy)

    def blocks(self, name: str, form: Form) -> list[int]:
        """The shape of its scales."""
        rows, columns = self.context.quantized[name].shape
        shape = [rows, columns // form.block]
        return shape[::-1] if form.columns_first else shape


def _product(graph: gs.Graph, context: Context, product: Product, form: Form, weights: _Weights,
             inputs: Inputs) -> None:
    (name,), node = product.names, product.node
    facts = context.quantized[name]
    scope = node.name.rpartition("/")[0]
    hold(context, (name,), form)
    x = inputs.ordered(product.x, facts, scope)
    codes = context.options.inputs.get(name)
    if codes is not None:
        if codes.kind == "e2m1" and hides_nan(graph, product):
            carry_nan(graph, product, x, context.element)
        x = inputs.rounded(x, codes, node.name)
        context.held[name] = replace(context.held[name], inputs=codes)
    node.inputs[0] = x
    weight = weights.of_product(name, form)
    builder = Nodes(graph, inputs.fresh(f"{scope}/weight"))
    node.inputs[1] = weight if form.columns_first else builder("swapped", "Transpose", weight, perm=[1, 0])
    if form.shift:
        out = node.outputs[0]
        symmetric = gs.Variable(f"{node.name}.symmetric")
        node.outputs[0] = symmetric
        shift = weights.parts.shift((name,), form, facts, weights.scale(name, form), weights.blocks(name, form))
        if not form.columns_first:
            shift = builder("shift_swapped", "Transpose", shift, perm=[1, 0])
        added = builder("shift", "MatMul", inputs.sums(x, facts.columns, form.block, scope), shift)
        edit.add_node(graph, "Add", [symmetric, added], name=f"{inputs.fresh(f'{scope}/shift')}/Add", outputs=[out])
    elif not context.target.engine:
        spell_clamp(graph, node, context.element)
