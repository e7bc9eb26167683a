"""The nodes by which a graph rounds the input of a product to codes of FP8 or NVFP4, and why nodes are not these.

FP8: QuantizeLinear with a zero point of e4m3, then DequantizeLinear. NVFP4: TensorRT's own operator, one
DequantizeLinear for the scales of its blocks and one for its codes. Attributes are part of the rule: other blocks,
another axis or another type are other numbers, and nothing that runs on a CPU reads TensorRT's operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..quantized.input_codes import BLOCK

if TYPE_CHECKING:
    import onnx

DYNAMIC, DOMAIN = "TRT_FP4DynamicQuantize", "trt"
DEQUANTIZES = "DequantizeLinear"
STANDARD = ("", "ai.onnx")
"""names of ONNX's own domain"""


def dynamic_attributes() -> dict[str, int]:
    """Attributes of `TRT_FP4DynamicQuantize`."""
    from onnx import TensorProto

    return {"axis": -1, "block_size": BLOCK, "scale_type": TensorProto.FLOAT8E4M3FN}


def number_attributes() -> dict[str, int]:
    """Attributes of the DequantizeLinear that makes numbers of its codes."""
    return {"axis": -1, "block_size": BLOCK}


def fp8_misfit(rounds: onnx.NodeProto, numbers: onnx.NodeProto, zero: onnx.TensorProto | None) -> str:
    """Why nodes do not round an input to e4m3 by one scale; "" if they do.

    Args:
        rounds: the QuantizeLinear.
        numbers: the DequantizeLinear that reads its codes.
        zero: the constant that is its third input, if there is one.
    """
    from onnx import TensorProto

    wrong = _misfit(rounds, "QuantizeLinear", STANDARD, 3, {}) or _misfit(numbers, DEQUANTIZES, STANDARD, 2, {})
    if wrong:
        return wrong
    if list(numbers.input) != [rounds.output[0], rounds.input[1]]:
        return "codes and numbers are made by two scales"
    if zero is None or zero.data_type != TensorProto.FLOAT8E4M3FN or zero.dims or any(zero.raw_data) or \
            any(zero.int32_data):
        return "the zero point is not 0 of e4m3"
    return ""


def nvfp4_misfit(rounds: onnx.NodeProto, steps: onnx.NodeProto, numbers: onnx.NodeProto) -> str:
    """Why nodes do not round an input to NVFP4 by one scale; "" if they do.

    Args:
        rounds: the dynamic quantizer.
        steps: the node that makes numbers of the scales of its blocks.
        numbers: the node that makes numbers of its codes.
    """
    wrong = _misfit(rounds, DYNAMIC, (DOMAIN,), 2, dynamic_attributes(), outputs=2) or \
        _misfit(steps, DEQUANTIZES, STANDARD, 2, {}) or \
        _misfit(numbers, DEQUANTIZES, STANDARD, 2, number_attributes())
    if wrong:
        return wrong
    if list(steps.input) != [rounds.output[1], rounds.input[1]] or \
            list(numbers.input) != [rounds.output[0], steps.output[0]]:
        return "codes and numbers are made by two scales"
    return ""


def _misfit(node: onnx.NodeProto, op: str, domains: tuple[str, ...], inputs: int, attributes: dict[str, int],
            outputs: int = 1) -> str:
    from onnx import AttributeProto

    if node.op_type != op or node.domain not in domains:
        return f"by {node.domain[:50]}.{node.op_type[:50]}, expected {op}"
    if (len(node.input), len(node.output)) != (inputs, outputs):
        return f"by {op} of {len(node.input)} inputs and {len(node.output)} outputs, expected {inputs} and {outputs}"
    found = {each.name: each.i if each.type == AttributeProto.INT else None for each in node.attribute}
    odd = sorted(name for name in {*found, *attributes} if found.get(name) != attributes.get(name))
    if odd:
        return f"by {op} with {odd[0][:50]} {found.get(odd[0])}, expected {attributes.get(odd[0])}"
    return ""
