"""How a graph's products round their inputs, held against the manifest: weight by weight, the type and the scale.

What is rounded by another scale, or not at all, can be as near to PyTorch as what is right: e4m3 is the same in every
octave. So scales are compared as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import InvalidBundle
from ..quantized.input_codes import BLOCK, CLOSE, InputCodes

if TYPE_CHECKING:
    import onnx

    from .quantization import Quantization

QUANTIZES = {"QuantizeLinear": "e4m3", "TRT_FP4DynamicQuantize": "e2m1"}
"""operator that makes codes of a product's input -> their kind"""
MADE = "/DequantizeLinear"
"""ends the name of the node that makes a weight's numbers; before it is the weight's name"""
BETWEEN = ("Cast", "Transpose")
"""operators between a weight's numbers and its product, each at most once"""
E4M3, NUMBERS = 17, (1, 10, 16)
"""ONNX's numbers of float8 e4m3fn, and of the types of scales"""
PLAIN: dict[str, int] = {}
BLOCKED = {"axis": -1, "block_size": BLOCK}
DYNAMIC = {**BLOCKED, "scale_type": E4M3}
"""attributes of the operators, as this package writes them"""


def inputs_in(model: onnx.ModelProto) -> dict[str, set[InputCodes | None]]:
    """Name of a weight that the graph dequantizes -> how products with it round their inputs; None: one does not. What
    rounds in another way than this package writes has a scale that is not a number."""
    found: dict[str, set[InputCodes | None]] = {}
    for _, name, codes in _products(model):
        found.setdefault(name, set()).add(codes)
    return found


def rounding_products(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that are products with a rounded input."""
    return {node for node, _, codes in _products(model) if codes is not None}


def _products(model: onnx.ModelProto) -> Iterator[tuple[str, str, InputCodes | None]]:
    """Every product with a weight that is dequantized: the node, the weight, how the input is rounded."""
    view = _View(model)
    for node in model.graph.node:
        if node.op_type != "MatMul":
            continue
        weight = view.maker(node, 1)
        for _ in BETWEEN:
            if weight is not None and weight.op_type in BETWEEN:
                weight = view.maker(weight, 0)
        if weight is not None and weight.op_type == "DequantizeLinear":
            yield node.name, weight.name.removesuffix(MADE), view.codes(node)


class _View:
    """A graph that may be anything: what it lacks is None."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def maker(self, node: onnx.NodeProto, place: int) -> onnx.NodeProto | None:
        """The node that makes an input of a node."""
        return self._makers.get(_at(node.input, place))

    def codes(self, product: onnx.NodeProto) -> InputCodes | None:
        """How a product rounds its input."""
        last = self.maker(product, 0)
        if last is not None and last.op_type == "Cast":
            last = self.maker(last, 0)
        first = self.maker(last, 0) if last is not None and last.op_type == "DequantizeLinear" else None
        if last is None or first is None or first.op_type not in QUANTIZES:
            return None
        kind = QUANTIZES[first.op_type]
        fits = self._is_fp8(first, last) if kind == "e4m3" else self._is_nvfp4(first, last)
        return InputCodes(kind, self._number(_at(first.input, 1)) if fits else math.nan)

    def _is_fp8(self, first: onnx.NodeProto, last: onnx.NodeProto) -> bool:
        """Whether two nodes round to e4m3 by one scale for all, around 0."""
        zero = self._constants.get(_at(first.input, 2))
        return (first.input[1:2] == last.input[1:2] and len(last.input) == 2 and len(first.input) == 3
                and _attributes(first) == _attributes(last) == PLAIN and zero is not None and zero.data_type == E4M3
                and zero.raw_data == b"\0" and last.input[0] == first.output[0])

    def _is_nvfp4(self, first: onnx.NodeProto, last: onnx.NodeProto) -> bool:
        """Whether nodes round to e2m1 in blocks: numbers of the codes are made by those of the blocks' scales."""
        steps = self.maker(last, 1)
        return (steps is not None and steps.op_type == "DequantizeLinear" and _attributes(steps) == PLAIN
                and [*steps.input] == [_at(first.output, 1), _at(first.input, 1)]
                and last.input[0] == first.output[0] and _attributes(first) == DYNAMIC and _attributes(last) == BLOCKED)

    def _number(self, name: str) -> float:
        """The one number of a constant; NaN where it is not one."""
        from onnx import TensorProto, numpy_helper

        tensor = self._constants.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL or tensor.data_type not in NUMBERS or any(
                size != 1 for size in tensor.dims):
            return math.nan
        try:
            return float(numpy_helper.to_array(tensor).reshape(-1)[0])
        except (ValueError, IndexError, TypeError):  # its bytes are not those of one number
            return math.nan


def _at(names: Sequence[str], place: int) -> str:
    return names[place] if len(names) > place else ""


def _attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


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
    if codes is None:
        return "not at all"
    return f"to {codes.kind} " + (f"by {codes.scale:.6g}" if math.isfinite(codes.scale) else "in another way")
