"""Whether a model is whole: names, order, recipes, interface, and the standard part by onnx's own checker.

onnx's checker does not know contributed ops and looks for every external file; it gets a copy in which weights are
inputs and such nodes have a domain of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import onnx

from ..errors import UnsupportedModel, cause_of
from ..graph_io import RECIPE, TensorFact

MAX_IR_VERSION = 13
UNREGISTERED = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
"""ops that ONNX Runtime keeps in the standard domain though the standard has none of that name"""
FIX = "this is a fault of gqa-export: please report the model it was exported from"


def check(model: onnx.ModelProto, inputs: Sequence[TensorFact], outputs: Sequence[TensorFact]) -> None:
    """Refuse a model that is not sound or has another interface.

    Args:
        model: its weights still recipes.
        inputs: what it must have, in this order.
        outputs: likewise.

    Raises:
        UnsupportedModel: with the fault; the model that was exported is one that gqa-export gets wrong.
    """
    where = f"graph {model.graph.name!r}"
    if model.ir_version > MAX_IR_VERSION:
        raise UnsupportedModel(f"the graph has IR version {model.ir_version}, expected {MAX_IR_VERSION} at most", where,
                               FIX, code="E-GRAPH-IR-VERSION")
    _check_interface("input", model.graph.input, inputs, where)
    _check_interface("output", model.graph.output, outputs, where)
    _check_names(model.graph, where)
    _check_recipes(model.graph, where)
    _check_standard(model, where)


def _check_interface(kind: str, values: Iterable[onnx.ValueInfoProto], facts: Sequence[TensorFact],
                     where: str) -> None:
    found = []
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        dims = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim)
        found.append(TensorFact(value.name, dtype, dims))
    for got, wanted in zip_longest(found, facts):
        if got != wanted:
            raise UnsupportedModel(f"the graph's {kind} is {got}, expected {wanted}", where, FIX,
                                   code="E-GRAPH-INTERFACE")


def _check_names(graph: onnx.GraphProto, where: str) -> None:
    given = [value.name for value in graph.input] + [tensor.name for tensor in graph.initializer]
    known = {"", *given}
    twice = [name for name, times in Counter(given).items() if times > 1]
    if twice:
        raise UnsupportedModel(f"two inputs or initializers are called {twice[0]!r}", where, FIX, code="E-GRAPH-NAME")
    nodes: set[str] = set()
    for node in graph.node:
        if node.name in nodes:
            raise UnsupportedModel(f"two nodes are called {node.name!r}", where, FIX, code="E-GRAPH-NAME")
        nodes.add(node.name)
        for name in node.input:
            if name not in known:
                raise UnsupportedModel(f"node {node.name!r} reads {name!r}, which is not computed before it", where,
                                       FIX, code="E-GRAPH-ORDER")
        for name in node.output:
            if name and name in known:
                raise UnsupportedModel(f"two nodes compute {name!r}", where, FIX, code="E-GRAPH-NAME")
            known.add(name)
    for value in graph.output:
        if value.name not in known:
            raise UnsupportedModel(f"output {value.name!r} is not computed by a node", where, FIX,
                                   code="E-GRAPH-OUTPUT")


def _check_recipes(graph: onnx.GraphProto, where: str) -> None:
    read = {name for node in graph.node for name in node.input}
    for tensor in graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
        if not location.startswith(RECIPE) or not all(location.removeprefix(RECIPE).split("+")):
            raise UnsupportedModel(f"weight {tensor.name!r} is at {location!r}, expected a recipe "
                                   f"{RECIPE}NAME or {RECIPE}A+B", where, FIX, code="E-GRAPH-RECIPE")
        if tensor.name not in read:
            raise UnsupportedModel(f"weight {tensor.name!r} is not read by any node", where, FIX, code="E-GRAPH-UNREAD")


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
        raise UnsupportedModel(f"onnx's checker refuses the graph: {cause_of(error)}", where, FIX,
                               code="E-GRAPH-CHECKER") from error
