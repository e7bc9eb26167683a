"""Target `ort`: MatMulNBits, MatMulBnb4 and GatherBlockQuantized.

MatMulNBits with floating-point zero points is fifty times slower. So `scale * code + minimum` is the symmetric product
plus the sums of the input's blocks times `minimum + 2^(bits-1) * scale`: exact, and three small nodes for each input.
Source: onnxruntime docs/ContribOperators.md.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...graph import edit
from ...graph.node_builder import Nodes
from ...graph.passes import Rewritten
from ...quantized.facts import BNB4, Form, bnb4_misfit, gather_form, nbits_form
from ..context import Context
from .inputs import Inputs
from .nan_guards import behind
from .parts import Parts, hold, keep_plain
from .readers import CONTRIB, Lookup, Product, find_readers, without_bias

UINT8 = onnx.TensorProto.UINT8


def quantize_graph(graph: gs.Graph, context: Context) -> Rewritten:
    """Every product and lookup of a quantized weight -> the operator that holds it; counts them."""
    quantized = context.quantized
    readers = find_readers(graph, quantized)
    forms: dict[str, Form] = {}
    plain = dict(readers.misfits)
    for name, facts in quantized.items():
        form = nbits_form(facts)
        if isinstance(form, str):
            plain.setdefault(name, form)
        elif misfit := bnb4_misfit(form, context.element):
            plain.setdefault(name, misfit)
        else:
            forms[name] = form
    for lookup in readers.lookups:
        if lookup.name in forms:
            gathered = gather_form(quantized[lookup.name], forms[lookup.name])
            if isinstance(gathered, str):
                plain.setdefault(lookup.name, gathered)
    for name, reason in plain.items():
        keep_plain(context, name, reason)
    parts, inputs = Parts(graph, context), Inputs(graph, context)
    products = [behind(graph, without_bias(graph, each)) for each in readers.products
                if not any(name in plain for name in each.names)]
    lookups = [each for each in readers.lookups if each.name not in plain]
    for product in products:
        _product(graph, context, product, forms[product.names[0]], parts, inputs)
    for lookup in lookups:
        _lookup(graph, context, lookup, forms[lookup.name], parts)
    edit.tidy(graph)
    return Rewritten(len(products) + len(lookups))


def _product(graph: gs.Graph, context: Context, product: Product, form: Form, parts: Parts, inputs: Inputs) -> None:
    quantized, names = context.quantized, product.names
    facts, rows = quantized[names[0]], sum(quantized[name].shape[0] for name in names)
    columns, blocks = facts.columns, -(-facts.columns // form.block)
    node, out = product.node, product.node.outputs[0]
    scope = node.name.rpartition("/")[0]
    number = node.name.rpartition("_")[2]
    hold(context, names, form)
    x = inputs.ordered(product.x, facts, scope)
    edit.remove(node)
    if form.operator == "MatMulBnb4":
        packed = [parts(names, form, "codes", UINT8, [rows * columns // 2]),
                  parts.number(names, form, "scale", [rows * blocks])]
        edit.add_node(graph, "MatMulBnb4", [x, *packed], name=f"{scope}/MatMulBnb4_{number}", domain=CONTRIB,
                      outputs=[out], attrs={"K": columns, "N": rows, "block_size": form.block,
                                            "quant_type": BNB4[facts.kind]})
        return
    scale = parts.number(names, form, "scale", [rows, blocks])
    ins: list[gs.Tensor | None] = [x, parts(names, form, "codes", UINT8, [rows, blocks, form.block * form.bits // 8]),
                                   scale]
    if form.zeros:
        ins.append(parts(names, form, "zero", UINT8, [rows, -(-blocks * form.bits // 8)]))
    symmetric = gs.Variable(f"{scope}/MatMulNBits_{number}.0") if form.shift else out
    edit.add_node(graph, "MatMulNBits", ins, name=f"{scope}/MatMulNBits_{number}", domain=CONTRIB, outputs=[symmetric],
                  attrs={"K": columns, "N": rows, "bits": form.bits, "block_size": form.block,
                         "accuracy_level": 0 if context.options.exact else 4})
    if form.shift:
        shift = parts.shift(names, form, facts, scale, [rows, blocks])
        sums = inputs.sums(x, columns, form.block, scope)
        added = edit.add_node(graph, "FusedMatMul", [sums, shift], name=f"{scope}/shift_{number}/FusedMatMul",
                              domain=CONTRIB, attrs={"alpha": 1.0, "transA": 0, "transB": 1, "transBatchA": 0,
                                                     "transBatchB": 0})[0]
        edit.add_node(graph, "Add", [symmetric, added], name=f"{scope}/shift_{number}/Add", outputs=[out])


def _lookup(graph: gs.Graph, context: Context, lookup: Lookup, held: Form, parts: Parts) -> None:
    names, facts = (lookup.name,), context.quantized[lookup.name]
    form = gather_form(facts, held)
    assert isinstance(form, Form)
    (rows, columns), blocks = facts.shape, facts.columns // form.block
    node, out = lookup.node, lookup.node.outputs[0]
    scope = node.name
    hold(context, names, form)
    edit.remove(node)
    scale = parts.number(names, form, "scale", [rows, blocks], held)
    ins = [parts(names, form, "codes", UINT8, [rows, columns * form.bits // 8], held), lookup.ids, scale,
           parts(names, form, "zero", UINT8, [rows, -(-blocks * form.bits // 8)], held if held.zeros else None)]
    symmetric = gs.Variable(f"{scope}/symmetric") if form.shift else out
    edit.add_node(graph, "GatherBlockQuantized", ins, name=scope.replace("Gather_", "GatherBlockQuantized_"),
                  domain=CONTRIB, outputs=[symmetric],
                  attrs={"bits": form.bits, "block_size": form.block, "quantize_axis": 1, "gather_axis": 0})
    if form.shift:
        shift = parts.shift(names, held, facts, scale, [rows, blocks])
        _shift_lookup(Nodes(graph, f"{scope}/shift"), lookup.ids, symmetric, shift, form.block, columns, out)


def _shift_lookup(node: Nodes, ids: gs.Tensor, symmetric: gs.Tensor, shift: gs.Tensor, block: int, columns: int,
                  out: gs.Tensor) -> None:
    """out = symmetric + shift[ids], each number of it for the columns of its block. ids `[batch, sequence]`."""
    each = node("unsqueezed", "Unsqueeze", node("rows", "Gather", shift, ids, axis=0), [-1])
    blocks = node("blocks", "Reshape", symmetric, [0, 0, -1, block])
    flat = edit.constant(f"{node.scope}/flat", np.array([0, 0, columns], np.int64))
    edit.add_node(node.graph, "Reshape", [node("sum", "Add", blocks, each), flat], name=f"{node.scope}/whole",
                  outputs=[out])
