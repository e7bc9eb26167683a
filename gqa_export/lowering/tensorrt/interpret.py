"""A `trt-plugin` graph for ONNX Runtime: every plugin node taken apart into standard ops and the op's function body.

This is how the ONNX of an engine is checked where no TensorRT can run: the plugin's own code is not in it. Rotation
becomes ai.onnx RotaryEmbedding at the positions past_lengths + 0 .. S - 1, absent sinks become -inf; a node that
approximates becomes a call of the op for long prompts, its selection an output. Where the cache holds codes, new keys
and values are quantized by a standard operator before the call, whose body reads codes as numbers; the scale of the
keys is a factor of its scores, that of the values one of its output. ONNX Runtime has few operators of fp8: there the
cache of the interpreted graph holds the numbers that codes stand for, in fp32. fp32 graphs only: others are widened
first (`validation.fp32_twin`). Weights of four bits that are floating-point codes, for which ONNX Runtime has no kernel
on a CPU, are unpacked and looked up by standard ops, from the same bytes; so are inputs that are rounded to such codes.
Dimensions as in `gqa_export.attention_op`.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ... import attention_op, graph_io, long_attention_op
from ...errors import InvalidBundle
from ...quantized.matrix import LEVELS
from ..attention_function import attach_function, is_call
from ..long_calls import SELECTION
from ..long_function import attach_long_function
from .fp4_inputs import interpret_fp4_inputs
from .plugin import PRESENCE

POSITIONS = "interpreted/positions"


def interpret(model: onnx.ModelProto) -> int:
    """Rewrite a lowered fp32 model in place.

    Args:
        model: of target `trt-plugin`, all its floats fp32.

    Returns:
        The number of plugin nodes.

    Raises:
        InvalidBundle: the inputs of a plugin node are not those that its flags announce: this version did not write it.
    """
    nodes: list[onnx.NodeProto] = []
    sizes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
             for value in (*model.graph.input, *model.graph.value_info)}
    tables = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 2}
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    known, wide = set[int](), set[str]()
    count = 0
    interpret_fp4_inputs(model)
    packed = _as_bytes(model.graph)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in packed:
            nodes += _unpacked(model.graph, node, packed[node.input[0]])
            continue
        if not is_call(node):
            nodes.append(node)
            continue
        count += 1
        inputs, attributes = _given(node), {each.name: helper.get_attribute_value(each) for each in node.attribute}
        lost = [inputs[kind] for kind in ("past_key", "past_value") if inputs[kind] not in sizes]
        if lost:
            raise InvalidBundle(f"a plugin node reads {lost[0]!r}, which is not a cache", f"node {node.name!r}",
                                "export the bundle again with this version of gqa-export",
                                code="E-BUNDLE-PLUGIN-NODE")
        # a layer without a cache reads the present of another
        sizes.update(zip(node.output[1:], (sizes[inputs["past_key"]], sizes[inputs["past_value"]])))
        heads = {"query": attributes["num_heads"], "key": attributes["kv_num_heads"]}
        if "cos" in inputs:
            table_rows, half = tables[casts.get(inputs["cos"], inputs["cos"])]
            if table_rows not in known:
                known.add(table_rows)
                nodes += _positions(model.graph, inputs["past_lengths"], table_rows)
            for name, number in heads.items():
                turned = f"{node.name}.{name}.rotated"
                nodes.append(helper.make_node(
                    "RotaryEmbedding", [inputs[name], inputs["cos"], inputs["sin"], f"{POSITIONS}_{table_rows}"],
                    [turned], name=turned, num_heads=number, interleaved=attributes["rotary_interleaved"],
                    rotary_embedding_dim=0 if 2 * half == sizes[inputs["past_key"]][3] else 2 * half))
                inputs[name] = turned
            del inputs["cos"], inputs["sin"]
        if "sinks" not in inputs:
            inputs["sinks"] = _no_sinks(model.graph, attributes["num_heads"])
        contract = long_attention_op if attributes.get("method", 0) else attention_op
        outputs, codes = list(node.output), attributes.get("cache_codes", 0)
        fp8, coded = codes == attention_op.CACHE_CODES["fp8"], codes == attention_op.CACHE_CODES["int8"]
        if codes:
            nodes += _quantized(model.graph, node, inputs, attributes, fp8)
        if coded:
            outputs[0] = f"{node.name}.of_codes"
        if contract is long_attention_op:
            outputs.append(SELECTION.format(graph_io.layer_of_cache(inputs["past_key"])))
            wide |= {inputs["fractions"], inputs["code_order"]}
        call = helper.make_node(contract.OP, [inputs.get(name, "") for name in contract.INPUT_NAMES], outputs,
                                name=node.name, domain=attention_op.DOMAIN)
        while not call.input[-1]:
            call.input.pop()
        call.attribute.extend(each for each in node.attribute if each.name in contract.ATTRIBUTE_NAMES)
        nodes.append(call)
        if coded:
            next(each for each in call.attribute if each.name == "scale").f *= attributes["key_scale"]
            factor = _constant(model.graph, f"{node.name}.value_scale", np.array(attributes["value_scale"], np.float32))
            nodes.append(helper.make_node("Mul", [outputs[0], factor], [node.output[0]], name=f"{node.name}.output"))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT8E4M3FN:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for tensor in model.graph.initializer:
        if tensor.name in wide:  # the op's tables are int64, the plugin's int32
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.int64), tensor.name))
    attach_function(model)
    attach_long_function(model)
    return count


def _quantized(graph: onnx.GraphProto, node: onnx.NodeProto, inputs: dict[str, str],
               attributes: dict[str, Any], fp8: bool) -> list[onnx.NodeProto]:
    """What makes codes of a call's new keys and values, which the inputs then are; of fp8, what they stand for."""
    made = []
    zero = _constant(graph, "interpreted/zero_code", np.array(0, ml_dtypes.float8_e4m3fn if fp8 else np.int8))
    for name in ("key", "value"):
        scale = _constant(graph, f"{node.name}.{name}_step", np.array(attributes[f"{name}_scale"], np.float32))
        codes = f"{node.name}.{name}.codes"
        made.append(helper.make_node("QuantizeLinear", [inputs[name], scale, zero], [codes], name=codes))
        inputs[name] = codes
        if fp8:
            inputs[name] = f"{codes}.numbers"
            made.append(helper.make_node("DequantizeLinear", [codes, scale, zero], [inputs[name]], name=inputs[name]))
    return made


def _given(node: onnx.NodeProto) -> dict[str, str]:
    """The inputs of a plugin node by name, after its presence flags."""
    flags = {each.name: each.i for each in node.attribute if each.name in PRESENCE}
    absent = {name for flag, first in PRESENCE.items() if not flags.get(flag, 0)
              for name in ({"key": ("key", "value"), "cos": ("cos", "sin")}.get(first, (first,)))}
    approximates = any(each.name == "method" and each.i for each in node.attribute)
    contract = long_attention_op if approximates else attention_op
    names = [name for name in contract.INPUT_NAMES if name not in absent]
    if len(flags) != len(PRESENCE) or len(names) != len(node.input) or "key" in absent:
        raise InvalidBundle(f"a plugin node has {len(node.input)} inputs, expected {len(names)} by its flags {flags}",
                            f"node {node.name!r}", "export the bundle again with this version of gqa-export",
                            code="E-BUNDLE-PLUGIN-NODE")
    return dict(zip(names, node.input))


def _constant(graph: onnx.GraphProto, name: str, value: np.ndarray) -> str:
    if all(tensor.name != name for tensor in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _no_sinks(graph: onnx.GraphProto, heads: int) -> str:
    return _constant(graph, f"interpreted/no_sinks_{heads}", np.full(heads, -np.inf, np.float32))


def _positions(graph: onnx.GraphProto, past_lengths: str, rows: int) -> list[onnx.NodeProto]:
    """int64 [B, S] past_lengths[:, None] + arange(S), kept within the tables: padding may lie beyond them."""
    stem = f"{POSITIONS}_{rows}"
    zero, one = _constant(graph, f"{stem}/zero", np.array(0)), _constant(graph, f"{stem}/one", np.array(1))
    first, last = (_constant(graph, f"{stem}/axis_{i}", np.array([i])) for i in (0, 1))
    most = _constant(graph, f"{stem}/most", np.array(rows - 1))
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Shape", [graph_io.INPUT_IDS], "steps", {"start": 1, "end": 2}), ("Squeeze", ["steps", first], "end", {}),
        ("Range", [zero, "end", one], "range", {}), ("Cast", [past_lengths], "past", {"to": TensorProto.INT64}),
        ("Unsqueeze", ["past", last], "column", {}), ("Add", ["column", "range"], "sum", {}),
        ("Max", ["sum", zero], "low", {}), ("Min", ["low", most], "", {})]
    made = {label for _, _, label, _ in steps}

    def full(name: str) -> str:
        return f"{stem}/{name}" if name in made else name

    return [helper.make_node(op, [full(name) for name in inputs], [f"{stem}/{label}" if label else stem],
                             name=f"{stem}/{op}", **attrs) for op, inputs, label, attrs in steps]


def _as_bytes(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """Make every initializer of float4 one of bytes, the same ones; gives their shapes in codes."""
    found = {}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT4E2M1:
            found[tensor.name] = list(tensor.dims)
            tensor.data_type = TensorProto.UINT8
            tensor.dims[-1] //= 2
    return found


def _unpacked(graph: onnx.GraphProto, node: onnx.NodeProto, shape: list[int]) -> list[onnx.NodeProto]:
    """What a DequantizeLinear of float4 means. The first of two codes is in the low bits (onnx/onnx docs/docsgen,
    "Float stored in 4 bits"); shape: `[..., K]`, of the codes."""
    stem, (codes, scale), attributes = f"interpreted/{node.name}", node.input[:2], \
        {each.name: each.i for each in node.attribute}
    block = attributes.get("block_size", 0)
    per_row = not block and "axis" in attributes
    apart = [*shape[:-1], shape[-1] // block, block] if block else shape
    low, bits = (_constant(graph, f"interpreted/{name}", np.array(value, np.uint8))
                 for name, value in (("low", 15), ("bits", 4)))
    table = _constant(graph, "interpreted/float4", LEVELS["e2m1"].astype(np.float32))
    last = _constant(graph, "interpreted/last", np.array([-1]))
    sizes, whole = (_constant(graph, f"{stem}/{name}", np.array(value, np.int64))
                    for name, value in (("apart", apart), ("shape", shape)))
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("BitwiseAnd", [codes, low], "first", {}), ("BitShift", [codes, bits], "second", {"direction": "RIGHT"}),
        ("Unsqueeze", [f"{stem}/first", last], "left", {}), ("Unsqueeze", [f"{stem}/second", last], "right", {}),
        ("Concat", [f"{stem}/left", f"{stem}/right"], "pairs", {"axis": -1}),
        ("Reshape", [f"{stem}/pairs", sizes], "codes", {}),
        ("Cast", [f"{stem}/codes"], "places", {"to": TensorProto.INT32}),
        ("Gather", [table, f"{stem}/places"], "numbers", {})]
    if block or per_row:
        steps.append(("Unsqueeze", [scale, last], "scale", {}))
        scale = f"{stem}/scale"
    steps += [("Mul", [f"{stem}/numbers", scale], "scaled", {}), ("Reshape", [f"{stem}/scaled", whole], "", {})]
    return [helper.make_node(op, inputs, [f"{stem}/{label}" if label else node.output[0]],
                             name=f"{stem}/{label or 'whole'}", **attrs) for op, inputs, label, attrs in steps]
