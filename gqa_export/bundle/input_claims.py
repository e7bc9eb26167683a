"""How a graph's products round their inputs, held against the manifest: weight by weight, the type and the scale.

What is rounded by another scale, or not at all, can be as near to PyTorch as what is right: e4m3 is the same in every
octave. So scales are compared as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..errors import InvalidBundle
from ..quantized.input_codes import CLOSE, InputCodes

if TYPE_CHECKING:
    import onnx

    from .quantization import Quantization

QUANTIZES = {"QuantizeLinear": "e4m3", "TRT_FP4DynamicQuantize": "e2m1"}
"""operator that makes codes of a product's input -> their kind"""
MADE = "/DequantizeLinear"
"""ends the name of the node that makes a weight's numbers; before it is the weight's name"""
BETWEEN = ("Cast", "Transpose")
"""operators between a weight's numbers and its product"""


def inputs_in(model: onnx.ModelProto) -> dict[str, set[InputCodes | None]]:
    """Name of a weight that the graph dequantizes -> how products with it round their inputs; None: one does not."""
    found: dict[str, set[InputCodes | None]] = {}
    for _, name, codes in _products(model):
        found.setdefault(name, set()).add(codes)
    return found


def rounding_products(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that are products with a rounded input."""
    return {node for node, _, codes in _products(model) if codes is not None}


def _products(model: onnx.ModelProto) -> Iterator[tuple[str, str, InputCodes | None]]:
    """Every product with a weight that is dequantized: the node, the weight, how the input is rounded."""
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMul":
            continue
        weight = makers.get(node.input[1])
        while weight is not None and weight.op_type in BETWEEN:
            weight = makers.get(weight.input[0])
        if weight is not None and weight.op_type == "DequantizeLinear":
            yield node.name, weight.name.removesuffix(MADE), _codes(makers.get(node.input[0]), makers, constants)


def _codes(last: onnx.NodeProto | None, makers: Mapping[str, onnx.NodeProto],
           constants: Mapping[str, onnx.TensorProto]) -> InputCodes | None:
    from onnx import TensorProto, numpy_helper

    if last is not None and last.op_type == "Cast":
        last = makers.get(last.input[0])
    first = makers.get(last.input[0]) if last is not None and last.op_type == "DequantizeLinear" else None
    if last is None or first is None or first.op_type not in QUANTIZES:
        return None
    kind, scale, back = QUANTIZES[first.op_type], constants.get(first.input[1]), last.input[1]
    if kind == "e2m1":  # numbers of the codes are made by those of the blocks' scales
        steps = makers.get(back)
        back = steps.input[1] if steps is not None and steps.input[0] == first.output[1] else ""
    if scale is None or scale.data_location == TensorProto.EXTERNAL or back != first.input[1]:
        return InputCodes(kind, math.nan)
    value = numpy_helper.to_array(scale)
    return InputCodes(kind, float(value.reshape(-1)[0]) if value.size == 1 else math.nan)


def check_inputs(model: onnx.ModelProto, quantization: Quantization | None, where: str) -> None:
    """Hold the inputs of a graph's products against its manifest.

    Raises:
        InvalidBundle: a product rounds its input otherwise than the manifest says, or not; names the weight.
    """
    stated = {weight.name: InputCodes(weight.inputs, weight.input_scale) if weight.inputs else None
              for weight in quantization.weights} if quantization else {}
    there = inputs_in(model)
    for name in sorted({*there, *(name for name, codes in stated.items() if codes)}):
        wanted, found = stated.get(name), there.get(name, {None})
        for codes in found:
            if not _same(codes, wanted):
                raise InvalidBundle(f"products with {name} round their inputs {_words(codes)} in the graph, "
                                    f"{_words(wanted)} in the manifest", where,
                                    "model.onnx and gqa_export.json belong to different exports: export again",
                                    code="E-BUNDLE-CLAIM")


def _same(one: InputCodes | None, other: InputCodes | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.kind == other.kind and math.isclose(one.scale, other.scale, rel_tol=CLOSE)


def _words(codes: InputCodes | None) -> str:
    return "not at all" if codes is None else f"to {codes.kind} by {codes.scale:.6g}"
