"""Whether a model is whole: names, order, recipes, interface, and what onnx's own checker says of the standard part.

onnx's checker knows no contributed op and wants every external file to exist; it is given a copy in which weights
are inputs and such nodes have a domain of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from ..errors import GqaExportError
from ..graph_io import TensorFact
from .match import RECIPE

MAX_IR_VERSION = 13
UNREGISTERED = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
"""ops that ONNX Runtime keeps in the standard domain though the standard has none of that name"""
FIX = "this is a fault of gqa-export: please report the model it was exported from"


def check(model: onnx.ModelProto, inputs: Sequence[TensorFact], outputs: Sequence[TensorFact]) -> None:
    """Raise GqaExportError unless `model`, its weights still recipes, is sound and has just this interface."""
    where = f"graph {model.graph.name!r}"
    if model.ir_version > MAX_IR_VERSION:
        raise GqaExportError(f"IR version {model.ir_version} is above {MAX_IR_VERSION}", where, FIX)
    _check_interface("input", model.graph.input, inputs, where)
    _check_interface("output", model.graph.output, outputs, where)
    _check_names(model.graph, where)
    _check_recipes(model.graph, where)
    _check_standard(model, where)


def _check_interface(kind: str, values, facts: Sequence[TensorFact], where: str) -> None:
    found = []
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        dims = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim)
        found.append(TensorFact(value.name, dtype, dims))
    for got, wanted in zip(found, facts):
        if got != wanted:
            raise GqaExportError(f"{kind} is {got}, expected {wanted}", where, FIX)
    if len(found) != len(facts):
        raise GqaExportError(f"{len(found)} {kind}s, expected {len(facts)}", where, FIX)


def _check_names(graph: onnx.GraphProto, where: str) -> None:
    known = {""} | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    if len(known) != 1 + len(graph.input) + len(graph.initializer):
        raise GqaExportError("two inputs or initializers share a name", where, FIX)
    nodes: set[str] = set()
    for node in graph.node:
        if node.name in nodes:
            raise GqaExportError(f"two nodes are called {node.name!r}", where, FIX)
        nodes.add(node.name)
        for name in node.input:
            if name not in known:
                raise GqaExportError(f"{node.name!r} reads {name!r}, which is not made before it", where, FIX)
        for name in node.output:
            if name and name in known:
                raise GqaExportError(f"{name!r} is made twice", where, FIX)
            known.add(name)
    for value in graph.output:
        if value.name not in known:
            raise GqaExportError(f"output {value.name!r} is never made", where, FIX)


def _check_recipes(graph: onnx.GraphProto, where: str) -> None:
    read = {name for node in graph.node for name in node.input}
    for tensor in graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
        if not location.startswith(RECIPE) or not all(location.removeprefix(RECIPE).split("+")):
            raise GqaExportError(f"weight {tensor.name!r} has no recipe but {location!r}", where, FIX)
        if tensor.name not in read:
            raise GqaExportError(f"weight {tensor.name!r} is read by no node", where, FIX)


def _check_standard(model: onnx.ModelProto, where: str) -> None:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = [t for t in copy.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inline = [t for t in copy.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    for tensor in weights:
        copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(inline)
    for node in copy.graph.node:
        if not node.domain and node.op_type in UNREGISTERED:
            node.domain = "com.microsoft"
    if not any(opset.domain == "com.microsoft" for opset in copy.opset_import):
        copy.opset_import.add(domain="com.microsoft", version=1)
    try:
        onnx.checker.check_model(copy)
    except onnx.checker.ValidationError as error:
        raise GqaExportError(f"onnx's checker refuses the graph: {str(error).splitlines()[0]}", where, FIX) from error
