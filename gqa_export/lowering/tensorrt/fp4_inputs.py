"""Inputs of products rounded to NVFP4 as TensorRT reads them, and what that means in standard operators.

`trt::TRT_FP4DynamicQuantize` finds the scale of each block of 16 columns as the graph runs, and gives codes of float4
and those scales in float8; one DequantizeLinear makes numbers of the scales, by the scale of all, and a second one of
the codes. ONNX Runtime has none of this on a CPU: there a function of standard operators takes the place of the three.
The rule is in `gqa_export.quantized.input_codes`. Dimensions: K columns.

Source: NVIDIA's onnx-tensorrt, `docs/TRT_custom_ops.md` and `onnxOpImporters.cpp`; TensorRT for RTX 1.7 wants the scale
of all in the input's own type.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from ... import attention_op
from ...errors import InvalidBundle
from ...graph.rounded_inputs import DOMAIN as DOMAIN
from ...graph.rounded_inputs import DYNAMIC as DYNAMIC
from ...graph.rounded_inputs import nvfp4_misfit
from ...quantized.input_codes import BLOCK

ROUNDED = "RoundedToNVFP4"
_BODY = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{op} (x, scale) => (rounded)
{{
    last = Constant <value_ints: ints = [-1]> ()
    block = Constant <value_ints: ints = [{block}]> ()
    half = Constant <value_float: float = 0.5> ()
    one = Constant <value_float: float = 1.0> ()
    two = Constant <value_float: float = 2.0> ()
    four = Constant <value_float: float = 4.0> ()
    six = Constant <value_float: float = 6.0> ()
    zero = Constant <value_float: float = 0.0> ()
    whole = Shape (x)
    front = Shape <start: int = 0, end: int = -1> (x)
    apart = Concat <axis: int = 0> (front, last, block)
    unknown = IsNaN (x)
    numbers_alone = Where (unknown, zero, x)
    blocks = Reshape (numbers_alone, apart)
    sizes = Abs (blocks)
    largest = ReduceMax <keepdims: int = 1> (sizes, last)
    wanted = Div (largest, six)
    held = QuantizeLinear <output_dtype: int = {e4m3}> (wanted, scale)
    step = DequantizeLinear (held, scale)
    nothing = Equal (step, zero)
    safe = Where (nothing, one, step)
    steps = Div (sizes, safe)
    most = Min (steps, six)
    small = Less (most, two)
    medium = Less (most, four)
    coarse = Where (medium, one, two)
    unit = Where (small, half, coarse)
    units = Div (most, unit)
    near = Round (units)
    codes = Mul (near, unit)
    sign = Sign (blocks)
    signed = Mul (codes, sign)
    numbers = Mul (signed, step)
    rounded = Reshape (numbers, whole)
}}
"""
"""Codes are halves up to 2, whole numbers up to 4, 4 and 6 beyond; Round takes ties to even, as codes have them. No
code is NaN: what TensorRT makes of one is not documented, and here it is the worst, a plausible number."""


def interpret_fp4_inputs(model: onnx.ModelProto) -> int:
    """Rewrite what rounds inputs to NVFP4 in an fp32 model as calls of a function in standard operators, in place.

    Returns:
        The number of roundings.

    Raises:
        InvalidBundle: nodes round to NVFP4 in another way than an export writes.
    """
    graph = model.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    dropped: set[str] = set()
    calls: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type != DYNAMIC or node.domain != DOMAIN:
            continue
        read = [readers.get(name, []) for name in node.output]
        wrong = nvfp4_misfit(node, read[1][0], read[0][0]) if [len(each) for each in read] == [1, 1] else \
            f"by a {DYNAMIC} whose outputs are read {' and '.join(str(len(each)) for each in read)} times"
        if wrong:
            raise InvalidBundle(f"an input is rounded to NVFP4 {wrong}", f"node {node.name[:200]!r}",
                                "export the bundle again with this version of gqa-export", code="E-BUNDLE-CLAIM")
        scales, numbers = read[1][0], read[0][0]
        dropped |= {scales.output[0], numbers.output[0]}
        calls[node.output[0]] = onnx.helper.make_node(ROUNDED, list(node.input), list(numbers.output), name=node.name,
                                                      domain=attention_op.DOMAIN)
    if not calls:
        return 0
    nodes = [calls.get(first, node) for node in graph.node
             if (first := next(iter(node.output), "")) not in dropped]
    del graph.node[:]
    graph.node.extend(nodes)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    text = _BODY.format(domain=attention_op.DOMAIN, op=ROUNDED, opset=opset, block=BLOCK, e4m3=TensorProto.FLOAT8E4M3FN)
    model.functions.append(onnx.parser.parse_function(text))
    if not any(entry.domain == attention_op.DOMAIN for entry in model.opset_import):
        model.opset_import.add(domain=attention_op.DOMAIN, version=attention_op.VERSION)
    return len(calls)
