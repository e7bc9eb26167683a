"""The lowest version of the standard ops at which a lowered model means the same: older runtimes take it then.

A model is traced at one version, and a runtime refuses every model of a version that it does not know, whatever
ops are in it. An op's definition holds from its `since_version` to the next one. Most later definitions only take
more types (8-bit floats, 4-bit integers) or attributes: without them a node means the same under the earlier one.

Two things decide for each node: `SAME_SINCE`, the result of reading every later definition, and the schemas of onnx:
the earlier definition must have the node's attributes, its number of inputs and outputs, and the types that it computes
with. An op that is not in the table counts from the definition in force. Subgraphs and functions count too; a model and
its functions have one version. The IR version is the one that belongs to it: an old runtime refuses a newer one too.

Source: onnx docs/Changelog.md, docs/Versioning.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType

import onnx

from .attention_function import opset_of

LOWEST = 17
"""of ONNX 1.12, June 2022; no older runtime was tried, and ONNX Runtime has GroupQueryAttention only since 2023"""

SAME_SINCE: Mapping[str, int] = MappingProxyType({
    # only types were added
    "ConstantOfShape": 9, "Cos": 7, "Equal": 13, "Flatten": 13, "HardSwish": 14, "Identity": 14, "If": 16, "IsInf": 10,
    "IsNaN": 13, "Loop": 16, "Mish": 18, "ReduceMax": 18, "ReduceMin": 18, "Round": 11, "Scan": 16, "Shape": 15,
    "Sin": 7, "Size": 13, "Softplus": 1, "Squeeze": 13, "Tan": 7, "TopK": 11, "Transpose": 13, "Unsqueeze": 13,
    "Reshape": 14, "Constant": 13, "Elu": 6, "Selu": 6, "HardSigmoid": 6,
    # `saturate` (19) and `round_mode` (24) are about 8-bit floats
    "Cast": 13, "CastLike": 15,
    # `num_outputs` (18): without it, and with sizes given, as before
    "Split": 13,
    # an input `axes` (18) and a mode (19)
    "Pad": 13,
    # two reductions (18)
    "ScatterElements": 16, "ScatterND": 16,
})
"""op: the earliest definition that means the same as every later one up to version 24 for a node that it admits"""

VALUES_SINCE: Mapping[tuple[str, str, bytes], int] = MappingProxyType({
    ("Pad", "mode", b"wrap"): 19, ("ScatterElements", "reduction", b"max"): 18,
    ("ScatterElements", "reduction", b"min"): 18, ("ScatterND", "reduction", b"max"): 18,
    ("ScatterND", "reduction", b"min"): 18,
})
"""values of an attribute that an earlier definition does not know though it has the attribute"""

Types = dict[str, frozenset[str]]
_STANDARD = ("", "ai.onnx")


def settle_opset(model: onnx.ModelProto) -> int:
    """Declare the lowest version at which the model means the same, in place, never a higher one than it has.

    Args:
        model: lowered, with its functions; its IR version is lowered to the one that belongs to the version.

    Returns:
        The version.
    """
    current = opset_of(model)
    version = max([LOWEST, *_needed(model, current)])
    if version >= current:
        return current
    for imports in (model.opset_import, *(function.opset_import for function in model.functions)):
        for entry in imports:
            if entry.domain in _STANDARD:
                entry.version = version
    ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", version)])
    model.ir_version = min(model.ir_version, ir_version)
    return version


def _needed(model: onnx.ModelProto, current: int) -> Iterator[int]:
    """The version that each node needs."""
    anything = _all_types(model)
    for graph in (model.graph, *model.functions):
        known: Types = {}
        if isinstance(graph, onnx.GraphProto):
            _add_declared(graph, known)
        yield from _needed_by(graph.node, current, known, anything)


def _needed_by(nodes: Iterable[onnx.NodeProto], current: int, known: Types, anything: frozenset[str]) -> Iterator[int]:
    for node in nodes:
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs) if attribute.type in (
                    onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) else ():
                inner = dict(known)
                _add_declared(graph, inner)
                yield from _needed_by(graph.node, current, inner, anything)
        schema = _schema(node.op_type, current) if node.domain in _STANDARD else None
        if schema is None:
            continue  # of another domain, whose version is its own, or one that ONNX Runtime keeps in this one
        _add_outputs(node, schema, known)
        yield _needed_version(node, schema, current, known, anything)


def _needed_version(node: onnx.NodeProto, schema: onnx.defs.OpSchema, current: int, known: Types,
                    anything: frozenset[str]) -> int:
    lowest = max(SAME_SINCE.get(node.op_type, schema.since_version), LOWEST)
    for version in range(lowest, current):
        earlier = _schema(node.op_type, version)
        if earlier is not None and _fits(node, earlier, schema, version, known, anything):
            return version
    return max(schema.since_version, lowest)


def _fits(node: onnx.NodeProto, earlier: onnx.defs.OpSchema, schema: onnx.defs.OpSchema, version: int, known: Types,
          anything: frozenset[str]) -> bool:
    """Whether an earlier definition admits a node that `schema` admits."""
    if earlier.since_version == schema.since_version:
        return True
    for attribute in node.attribute:
        if attribute.name not in earlier.attributes:
            return False
        if version < VALUES_SINCE.get((node.op_type, attribute.name, attribute.s), 0):
            return False
    if len(node.input) > earlier.max_input or len(node.output) > earlier.max_output:
        return False
    pairs = ((node.input, earlier.inputs, schema.inputs), (node.output, earlier.outputs, schema.outputs))
    for names, before, after in pairs:
        for place, name in enumerate(names):
            here = known.get(name, anything) & _admitted(after, place)
            if name and not here <= _admitted(before, place):
                return False
    return True


def _admitted(formal: Sequence[onnx.defs.OpSchema.FormalParameter], place: int) -> frozenset[str]:
    return frozenset(formal[min(place, len(formal) - 1)].types)


@cache
def _schema(op: str, version: int) -> onnx.defs.OpSchema | None:
    """The definition in force at a version; None where the standard has none."""
    if not onnx.defs.has(op, ""):
        return None
    try:
        return onnx.defs.get_schema(op, version, "")
    except onnx.defs.SchemaError:
        return None


def _type_name(element: int) -> str:
    return f"tensor({onnx.helper.tensor_dtype_to_string(element).rpartition('.')[2].lower()})"


def _add_declared(graph: onnx.GraphProto, known: Types) -> None:
    """Types of inputs and initializers. Those of values in between may be left over from a pass: they are derived."""
    for value in graph.input:
        if value.type.tensor_type.elem_type:
            known[value.name] = frozenset({_type_name(value.type.tensor_type.elem_type)})
    for tensor in graph.initializer:
        known[tensor.name] = frozenset({_type_name(tensor.data_type)})


def _add_outputs(node: onnx.NodeProto, schema: onnx.defs.OpSchema, known: Types) -> None:
    """Types of a node's outputs, where its inputs and attributes tell."""
    bound = {formal.type_str: known[name] for formal, name in zip(_spread(schema.inputs, len(node.input)), node.input)
             if name in known}
    own = _own_type(node)
    if node.op_type == "CastLike" and node.input[1] in known:
        own = known[node.input[1]]
    for formal, name in zip(_spread(schema.outputs, len(node.output)), node.output):
        found = own or bound.get(formal.type_str) or frozenset(formal.types)
        if own or len(found) == 1:
            known[name] = found


def _spread(formal: Sequence[onnx.defs.OpSchema.FormalParameter],
            count: int) -> list[onnx.defs.OpSchema.FormalParameter]:
    """One formal parameter for each actual one: the last may stand for many."""
    return [formal[min(place, len(formal) - 1)] for place in range(count)]


def _own_type(node: onnx.NodeProto) -> frozenset[str] | None:
    """The type that an attribute gives a node's output."""
    for attribute in node.attribute:
        if attribute.name == "to" and node.op_type == "Cast":
            return frozenset({_type_name(attribute.i)})
        if attribute.name == "value" and attribute.t.data_type:
            return frozenset({_type_name(attribute.t.data_type)})
        if attribute.name in ("value_int", "value_ints"):
            return frozenset({"tensor(int64)"})
        if attribute.name in ("value_float", "value_floats"):
            return frozenset({"tensor(float)"})
    return frozenset({"tensor(float)"}) if node.op_type == "ConstantOfShape" else None


def _all_types(model: onnx.ModelProto) -> frozenset[str]:
    """Every type that may occur: what a value of unknown type can be."""
    elements = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    elements |= {tensor.data_type for tensor in model.graph.initializer}
    for graph in (model.graph, *model.functions):
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to":
                    elements.add(attribute.i)
                elif attribute.t.data_type:
                    elements.add(attribute.t.data_type)
    names = {_type_name(element) for element in elements if element}
    return frozenset(names | {"tensor(float)", "tensor(int64)", "tensor(int32)", "tensor(bool)"})
