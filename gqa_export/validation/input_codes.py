"""Products whose inputs have the type of their weight (`--activations same`): the rule by which PyTorch rounds them,
the scales that the checkpoint gives, and a graph in which they are not rounded.

The rule is in `gqa_export.quantized.input_codes`. Dimensions: K columns of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..bundle.quantization import KEPT
from ..checkpoint.quantized.parameters import parameters_of
from ..errors import InvalidBundle
from ..lowering.tensorrt.fp4_inputs import DYNAMIC, ROUNDED
from ..quantized.input_codes import BLOCK, CLOSE, MOST, InputCodes, held_as, scale_of
from ..quantizing.importance import FILE, read_largest
from .quantized_reference import calibrated_again

if TYPE_CHECKING:
    import onnx

    from ..bundle.manifest import Manifest
    from ..bundle.quantization import QuantizedWeight
    from ..checkpoint.checkpoint import Checkpoint

SAME = "same"
MEASURED_AGAIN = 2.0**-7
"""how far a scale may be from one that was measured by other threads, and rounded to bf16"""


@dataclass(frozen=True)
class StatedInputs:
    """How products round their inputs.

    Attributes:
        codes: name of a weight -> the rule of its products.
        proved: the scales were held against the checkpoint or the calibration text, not against the bundle's own
            record alone.
    """

    codes: Mapping[str, InputCodes] = field(default_factory=dict)
    proved: bool = True


def stated_inputs(checkpoint: Checkpoint, manifest: Manifest, names: Collection[str], notes: list[str],
                  text: Path | None = None, folder: Path | None = None) -> StatedInputs:
    """How products round their inputs, of all weights that a manifest names. The scales are those of the checkpoint or
    of the calibration text: what the manifest says must be the same.

    Args:
        checkpoint: that was exported. manifest: of the bundle. names: of the model's parameters.
        notes: takes a line where the scales were held against nothing but what the bundle itself says of the text.
        text: the calibration text, which is measured again. None: the bundle holds what it said.
        folder: of the bundle.

    Raises:
        GqaExportError: the calibration text is needed, and is missing or another one.
        InvalidBundle: the manifest names another scale, or inputs that have none.
    """
    quantization = manifest.quantization
    if quantization is None or quantization.activations != SAME:
        return StatedInputs()
    rounding = [weight for weight in quantization.weights if weight.inputs]
    if not rounding:
        return StatedInputs()
    most, proved = CLOSE, True
    if quantization.method in KEPT:
        stored = parameters_of(checkpoint, names)[0]
        scales = {name: matrix.input_scale for name, matrix in stored.items() if matrix.input_scale is not None}
    else:
        if text is None and folder is not None and FILE in manifest.files:
            largest, proved = read_largest(folder), False
            notes.append(f"the scales of inputs agree with the bundle's own {FILE}; they were not held against the "
                         "checkpoint: --calibrate TEXT measures them again")
        else:
            largest, most = calibrated_again(checkpoint, quantization, text).largest, MEASURED_AGAIN
        scales = {weight.name: scale_of(largest[weight.name], weight.inputs) for weight in rounding
                  if weight.name in largest}
    return StatedInputs({weight.name: _agreed(weight, scales.get(weight.name), manifest.dtype, most, checkpoint.source)
                         for weight in rounding}, proved)


def _agreed(weight: QuantizedWeight, scale: float | None, dtype: str, most: float, where: str) -> InputCodes:
    wanted = 0.0 if scale is None else held_as(scale, weight.inputs, dtype)
    if not math.isclose(wanted, weight.input_scale, rel_tol=most):
        found = "the checkpoint has none" if scale is None else f"the checkpoint or its calibration says {wanted:.6g}"
        raise InvalidBundle(f"the manifest says that products with {weight.name} round their inputs by the scale "
                            f"{weight.input_scale:.6g}, and {found}", where,
                            "validate against the checkpoint that was exported, or export it again",
                            code="E-BUNDLE-QUANTIZATION")
    return InputCodes(weight.inputs, weight.input_scale)


def rounded_to_codes(values: torch.Tensor, codes: InputCodes) -> torch.Tensor:
    """`[.., K]` rounded to codes, in its own number format; computed in fp32. A NaN stays one."""
    near = {"e4m3": _e4m3, "e2m1": _nvfp4}[codes.kind]
    return near(values.float(), codes.scale).to(values.dtype)


def _e4m3(values: torch.Tensor, scale: float) -> torch.Tensor:
    most = MOST["e4m3"]
    return (values / scale).clamp(-most, most).to(torch.float8_e4m3fn).float() * scale


def _nvfp4(values: torch.Tensor, scale: float) -> torch.Tensor:
    blocks = values.unflatten(-1, (-1, BLOCK))
    step = _e4m3(blocks.abs().amax(-1, keepdim=True) / 6, scale)
    size = (blocks.abs() / torch.where(step == 0, 1.0, step)).clamp(max=6)
    unit = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (torch.round(size / unit) * unit * blocks.sign() * step).flatten(-2)


def bypass_inputs(graph: onnx.GraphProto) -> int:
    """Let every product read its input as it is; gives the number of roundings that are left out."""
    makers = {name: node for node in graph.node for name in node.output}
    found = set()
    for node in graph.node:
        rounding = _rounding(node, makers)
        if rounding is not None:
            found.add(node.input[0])
            node.input[0] = rounding
    return len(found)


def rounds_inputs(graph: onnx.GraphProto) -> bool:
    """Whether a product reads a rounded input."""
    makers = {name: node for node in graph.node for name in node.output}
    return any(_rounding(node, makers) is not None for node in graph.node)


def _rounding(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> str | None:
    """What a product's input was before it was rounded; None where it is not, or the node is no product."""
    def maker(of: onnx.NodeProto | None) -> onnx.NodeProto | None:
        return makers.get(of.input[0]) if of is not None and of.input else None

    last = maker(node) if node.op_type == "MatMul" else None
    narrow = last is not None and last.op_type == "Cast"
    if narrow:
        last = maker(last)
    if last is not None and last.op_type == ROUNDED:
        return last.input[0]
    first = maker(last) if last is not None and last.op_type == "DequantizeLinear" else None
    if first is None or first.op_type not in ("QuantizeLinear", DYNAMIC) or not first.input:
        return None
    wide = maker(first)
    return wide.input[0] if narrow and wide is not None and wide.op_type == "Cast" else first.input[0]
