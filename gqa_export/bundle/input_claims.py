"""How a graph's products round their inputs, held against the manifest: weight by weight, the type and the scale.

What is rounded by another scale, or not at all, can be as near to PyTorch as what is right: e4m3 is the same in every
octave. So scales are compared as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..errors import InvalidBundle
from ..graph.rounded_inputs import DEQUANTIZES, DYNAMIC, fp8_misfit, nvfp4_misfit
from ..quantized.input_codes import CLOSE, InputCodes

if TYPE_CHECKING:
    import onnx

    from .quantization import Quantization

MADE = "/DequantizeLinear"
"""ends the name of the node that makes a weight's numbers; before it is the weight's name"""
BETWEEN = ("Cast", "Transpose")
"""operators between a weight's numbers and its product"""


def inputs_in(model: onnx.ModelProto) -> dict[str, set[InputCodes | str | None]]:
    """Name of a weight that the graph dequantizes -> how products with it round their inputs; a sentence where they do
    it as no export does; None: one does not. Products with other weights are there where they round their inputs.

    Raises:
        InvalidBundle: a node lacks an input, or nodes read one another.
    """
    found: dict[str, set[InputCodes | str | None]] = {}
    for _, name, codes in _products(model):
        found.setdefault(name, set()).add(codes)
    return found


def rounding_products(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that are products with a rounded input."""
    return {node for node, _, codes in _products(model) if codes is not None}


def _products(model: onnx.ModelProto) -> Iterator[tuple[str, str, InputCodes | str | None]]:
    """Every product with a weight that is dequantized, and every other one whose input is rounded: the node, the weight
    (of the latter what the graph calls it), how the input is rounded."""
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMul":
            continue
        name, between = _input(node, 1), set()
        weight = makers.get(name)
        while weight is not None and weight.op_type in BETWEEN:
            between.add(weight.output[0])
            name = _input(weight, 0)
            weight = makers.get(name)
            if weight is not None and between.intersection(weight.output):
                raise _wrong(weight, "reads what is made of its own output")
        codes = _codes(makers.get(node.input[0]), makers, constants)
        if weight is not None and weight.op_type == DEQUANTIZES:
            yield node.name, weight.name.removesuffix(MADE), codes
        elif codes is not None:  # the exact verdict leaves it out, and the other has room for it: nothing else tells
            yield node.name, name, codes


def _input(node: onnx.NodeProto, place: int) -> str:
    if len(node.input) <= place:
        raise _wrong(node, f"has {len(node.input)} inputs")
    return node.input[place]


def _wrong(node: onnx.NodeProto, words: str) -> InvalidBundle:
    return InvalidBundle(f"model.onnx is not a valid graph: a {node.op_type[:50]} {words}", f"node {node.name[:200]!r}",
                         "do not use this bundle; export it again from a checkpoint you trust", code="E-BUNDLE-CLAIM")


def _codes(last: onnx.NodeProto | None, makers: Mapping[str, onnx.NodeProto],
           constants: Mapping[str, onnx.TensorProto]) -> InputCodes | str | None:
    """How an input is rounded that the node `last` makes. What an export writes between the product and the codes, and
    before these: numbers of fp32 from and to the graph's own type, for FP8 alone."""
    narrow = last is not None and last.op_type == "Cast"
    if last is not None and narrow:
        last = makers.get(_input(last, 0))
    first = makers.get(_input(last, 0)) if last is not None and last.op_type == DEQUANTIZES else None
    if last is None or first is None or first.op_type not in ("QuantizeLinear", DYNAMIC):
        return None
    scale = constants.get(_input(first, 1))
    if first.op_type == DYNAMIC:
        kind, steps = "e2m1", makers.get(_input(last, 1))
        wrong = "by a scale that no node makes" if steps is None else nvfp4_misfit(first, steps, last)
        wrong = wrong or ("between other types" if narrow else "")
    else:
        kind, wide = "e4m3", makers.get(_input(first, 0))
        wrong = fp8_misfit(first, last, constants.get(first.input[2]) if len(first.input) > 2 else None)
        wrong = wrong or ("from another type than fp32" if narrow and not _widens(wide) else "")
    value = _number(scale)
    if wrong or value is None:
        return f"to {kind}, {wrong or 'by a scale that is not a number in the graph'}"
    return InputCodes(kind, value)


def _widens(node: onnx.NodeProto | None) -> bool:
    from onnx import TensorProto

    return node is not None and node.op_type == "Cast" and len(node.input) == 1 and \
        [(each.name, each.i) for each in node.attribute] == [("to", TensorProto.FLOAT)]


def _number(tensor: onnx.TensorProto | None) -> float | None:
    """What a tensor of one number holds; None where it is not one."""
    from onnx import TensorProto, numpy_helper

    if tensor is None or tensor.data_location == TensorProto.EXTERNAL or math.prod(tensor.dims) != 1 or \
            tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        return None
    try:
        return float(numpy_helper.to_array(tensor).reshape(-1)[0])
    except (ValueError, TypeError, IndexError):  # its bytes are not those of one number
        return None


def check_inputs(model: onnx.ModelProto, quantization: Quantization | None, where: str) -> None:
    """Hold the inputs of a graph's products against its manifest.

    Raises:
        InvalidBundle: a product rounds its input otherwise than the manifest says, or not, which names the weight; or
            a node lacks an input, or nodes read one another.
    """
    stated: dict[str, InputCodes | None] = {
        weight.name: InputCodes(weight.inputs, weight.input_scale) if weight.inputs else None
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


def _same(one: InputCodes | str | None, other: InputCodes | None) -> bool:
    if not isinstance(one, InputCodes) or other is None:
        return one is other
    return one.kind == other.kind and math.isclose(one.scale, other.scale, rel_tol=CLOSE)


def _words(codes: InputCodes | str | None) -> str:
    if isinstance(codes, str):
        return codes
    return "not at all" if codes is None else f"to {codes.kind} by {codes.scale:.6g}"
