"""Bundles of `--activations same` whose graph, manifest, record of the calibration text and checkpoint do not say the
same of how inputs of products are rounded. Each must be refused.

No number tells of these. What is not rounded is nearer to the reference than what is; e4m3 has the same digits in every
octave, so that twice the scale is as good; and where bundle and PyTorch round by one wrong scale, both are wrong alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from evidence.mutations.contradictions import Contradiction
from evidence.mutations.mutation import NotHere, sign
from gqa_export.bundle.manifest import MODEL, Manifest, read_manifest
from gqa_export.bundle.quantization import Quantization, QuantizedWeight
from gqa_export.graph.rounded_inputs import DEQUANTIZES, DYNAMIC
from gqa_export.quantized.input_codes import MOST, NO_SCALE
from gqa_export.quantizing.importance import FILE, importance_file, read_importance, read_largest

AGAINST = "what bundle, text and checkpoint say of inputs, against one another"
PLACE = "model.layers.1.self_attn.o_proj"
SCALE = "/input/scale"

Graph = Callable[[onnx.ModelProto], None]
Stated = Callable[[Manifest], Manifest]


def _rounded(folder: Path, kind: str, kept: bool | None = None) -> Quantization:
    """What a bundle with rounded inputs says. kind: of their codes. kept: the checkpoint gave their scales, or a text
    did. NotHere: it is another bundle."""
    quantization = read_manifest(folder).quantization
    if quantization is None or not any(weight.inputs == kind for weight in quantization.weights):
        raise NotHere("rounded inputs")
    if kept is not None and kept != (quantization.method == "keep"):
        raise NotHere("scales of that origin")
    return quantization


def _change(folder: Path, graph: Graph | None = None, stated: Stated | None = None) -> None:
    """Change graph and manifest, and repair hashes."""
    if graph is not None:
        model = onnx.load(str(folder / MODEL), load_external_data=False)
        graph(model)
        onnx.save(model, str(folder / MODEL))
    manifest = read_manifest(folder)
    sign(folder, stated(manifest) if stated else manifest)


def _in_graph(graph: Graph, kind: str = "e4m3") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        _rounded(folder, kind)
        _change(folder, graph)
    return change


def _product(model: onnx.ModelProto, name: str = PLACE) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "MatMul" and node.name.startswith(f"{name}/"))


def _codes(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.NodeProto:
    """The node that rounds a product's input, in a graph of fp32."""
    makers = {name: each for each in model.graph.node for name in each.output}
    return makers[makers[node.input[0]].input[0]]


def _not_rounded(model: onnx.ModelProto) -> None:
    node = _product(model)
    node.input[0] = _codes(model, node).input[0]


def _scales(model: onnx.ModelProto) -> Iterator[TensorProto]:
    return (tensor for tensor in model.graph.initializer if tensor.name.endswith(SCALE))


def _times(model: onnx.ModelProto, factor: float) -> None:
    for tensor in _scales(model):
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), tensor.name))


def _exchanged(model: onnx.ModelProto) -> None:
    first, second = _product(model), _product(model, "model.layers.1.mlp.down_proj")
    names = [_codes(model, node).input[1] for node in (first, second)]
    one, other = (next(tensor for tensor in _scales(model) if tensor.name == name) for name in names)
    values = numpy_helper.to_array(one).copy()
    one.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(other), one.name))
    other.CopyFrom(numpy_helper.from_array(values, other.name))


def _zero_of(model: onnx.ModelProto, element: int) -> None:
    name = _codes(model, _product(model)).input[2]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(TensorProto(name=name, data_type=element, raw_data=b"\0"))


def _dynamic(model: onnx.ModelProto, attribute: str, value: int) -> None:
    node = next(node for node in model.graph.node if node.op_type == DYNAMIC and node.name.startswith(f"{PLACE}/"))
    next(each for each in node.attribute if each.name == attribute).i = value


def _invented(model: onnx.ModelProto) -> None:
    """The head reads its input through codes; its weight is plain, or has codes of integers."""
    head, scale, zero = _product(model, "lm_head"), "broken/scale", "broken/zero"
    model.graph.initializer.extend([
        numpy_helper.from_array(np.float32(2.0**-6), scale),
        TensorProto(name=zero, data_type=TensorProto.FLOAT8E4M3FN, raw_data=b"\0")])
    place = next(number for number, node in enumerate(model.graph.node) if node.name == head.name)
    made = (helper.make_node("QuantizeLinear", [head.input[0], scale, zero], ["broken/c"], "broken/codes"),
            helper.make_node(DEQUANTIZES, ["broken/c", scale], ["broken/n"], "broken/numbers"))
    head.input[0] = "broken/n"
    for number, node in enumerate(made):
        model.graph.node.insert(place + number, node)


def _weights(manifest: Manifest, change: Callable[[QuantizedWeight], QuantizedWeight]) -> Manifest:
    """Another statement of every weight whose inputs are rounded."""
    assert manifest.quantization is not None
    weights = tuple(change(each) if each.inputs else each for each in manifest.quantization.weights)
    return replace(manifest, quantization=replace(manifest.quantization, weights=weights))


def _stated(manifest: Manifest, factor: float) -> Manifest:
    return _weights(manifest, lambda each: replace(each, input_scale=factor * each.input_scale))


def _scaled(factor: float, kept: bool, record: bool = False) -> Callable[[Path], None]:
    """Every scale of inputs times a factor, in graph and manifest. record: and in what the bundle holds of the text."""
    def change(folder: Path) -> None:
        _rounded(folder, "e4m3", kept)
        if record:
            _record_times(folder, factor)
        _change(folder, partial(_times, factor=factor), partial(_stated, factor=factor))
    return change


def _record_times(folder: Path, factor: float) -> None:
    sizes = {name: factor * size for name, size in read_largest(folder).items()}
    (folder / FILE).write_bytes(importance_file(read_importance(folder), sizes))


def _record_alone(folder: Path) -> None:
    _rounded(folder, "e4m3", kept=False)
    _record_times(folder, 2.0)
    _change(folder)


def _in_amax(folder: Path) -> None:
    """The largest input itself in place of what a code of 1 stands for."""
    _scaled(MOST["e4m3"], kept=False)(folder)


def _other_type(folder: Path) -> None:
    _rounded(folder, "e4m3")
    _change(folder, stated=partial(_weights, change=lambda each: replace(each, inputs="e2m1")))


def _other_codes(folder: Path) -> None:
    """The weight is said to have the other type too, so that the manifest agrees with itself."""
    _rounded(folder, "e4m3")
    _change(folder, stated=partial(_weights, change=lambda each: replace(each, inputs="e2m1", kind="e2m1", bits=4)))


def _not_stated(folder: Path) -> None:
    _rounded(folder, "e4m3")
    _change(folder, stated=partial(_weights, change=partial(_exact, reason=NO_SCALE)))


def _in_silence(folder: Path) -> None:
    """Rounded neither in the graph nor in the manifest, for which nothing is said."""
    _rounded(folder, "e4m3")
    _change(folder, _not_rounded, partial(_weights, change=lambda each: _exact(each) if PLACE in each.name else each))


def _exact(weight: QuantizedWeight, reason: str = "") -> QuantizedWeight:
    return replace(weight, inputs="", input_scale=0.0, inputs_reason=reason)


def _record_lost(folder: Path) -> None:
    _rounded(folder, "e4m3", kept=False)
    manifest = read_manifest(folder)
    (folder / FILE).unlink()
    sign(folder, replace(manifest, files={name: fact for name, fact in manifest.files.items() if name != FILE}))


def _head_rounded(folder: Path, kept: bool) -> None:
    _rounded(folder, "e4m3", kept)
    _change(folder, _invented)


CLAIM, SCALES = "E-BUNDLE-CLAIM", "E-BUNDLE-QUANTIZATION"
_Row = partial(Contradiction, breaks=AGAINST)
INPUT_CONTRADICTIONS: tuple[Contradiction, ...] = (
    _Row("rounding of an input left out", _in_graph(_not_rounded), CLAIM, (PLACE, "not at all in the graph")),
    _Row("rounding to NVFP4 left out", _in_graph(_not_rounded, "e2m1"), CLAIM, (PLACE, "not at all in the graph")),
    _Row("rounding that the manifest does not state", _not_stated, CLAIM, ("not at all in the manifest",)),
    _Row("rounding left out in graph and manifest", _in_silence, "E-BUNDLE-MANIFEST", ("its inputs are not rounded",)),
    _Row("rounded input of a plain matrix", partial(_head_rounded, kept=True), CLAIM,
         ("lm_head", "not at all in the manifest")),
    _Row("rounded input of codes of integers", partial(_head_rounded, kept=False), CLAIM,
         ("lm_head", "not at all in the manifest")),
    _Row("input scales doubled in the graph", _in_graph(partial(_times, factor=2.0)), CLAIM,
         ("round their inputs", "in the graph", "in the manifest")),
    _Row("input scales of NVFP4 doubled in the graph", _in_graph(partial(_times, factor=2.0), "e2m1"), CLAIM,
         ("round their inputs", "in the graph", "in the manifest")),
    _Row("input scales of two products exchanged", _in_graph(_exchanged), CLAIM, ("layers.1.", "in the manifest")),
    _Row("input scales doubled in graph and manifest, stored in the checkpoint", _scaled(2.0, kept=True), SCALES,
         ("the checkpoint or its calibration says",), opens=True),
    _Row("input scales doubled in graph and manifest, of a text", _scaled(2.0, kept=False), SCALES,
         ("the checkpoint or its calibration says",), opens=True),
    _Row("input scales doubled in graph, manifest and record of the text, beside the text",
         _scaled(2.0, kept=False, record=True), SCALES, ("the checkpoint or its calibration says",), text=True),
    _Row("record of the text doubled", _record_alone, SCALES, ("the checkpoint or its calibration says",), opens=True),
    _Row("record of the text lost", _record_lost, "E-VALIDATE-CALIBRATION", ("--calibrate",), opens=True),
    _Row("input scales in the unit of inputs", _in_amax, SCALES, ("the checkpoint or its calibration says",),
         opens=True),
    _Row("input type of another format in the manifest", _other_type, "E-BUNDLE-MANIFEST", ("inputs of e2m1",)),
    _Row("input and weight type of another format in the manifest", _other_codes, CLAIM, ("to e4m3", "to e2m1")),
    _Row("inputs of e5m2 in the graph", _in_graph(partial(_zero_of, element=TensorProto.FLOAT8E5M2)), CLAIM,
         (PLACE, "zero point")),
    _Row("inputs of int8 in the graph", _in_graph(partial(_zero_of, element=TensorProto.INT8)), CLAIM,
         (PLACE, "zero point")),
    _Row("blocks of inputs along another axis", _in_graph(partial(_dynamic, attribute="axis", value=1), "e2m1"), CLAIM,
         (PLACE, "axis")),
    _Row("blocks of inputs of another size", _in_graph(partial(_dynamic, attribute="block_size", value=32), "e2m1"),
         CLAIM, (PLACE, "block_size")),
)
