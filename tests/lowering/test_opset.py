"""The version of the standard ops that a graph declares: the lowest at which every node means the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gqa_export.graph.check import UNREGISTERED
from gqa_export.lowering.attention_function import opset_of
from gqa_export.lowering.opset import LOWEST, SAME_SINCE, VALUES_SINCE, settle_opset
from gqa_export.targets import TARGETS

from .whole_model import Decoder, canonical, eager, lowered, with_weights

TRACED = 24
"""the highest version that a graph of ours has"""
HEAD_12 = (("head_dim", 12),)


def model_of(*nodes: onnx.NodeProto, element: int = TensorProto.FLOAT, opset: int = 23,
             functions=()) -> onnx.ModelProto:
    """A model of these nodes from "x" to "y"."""
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", element, [2, 3])],
                              [helper.make_tensor_value_info("y", element, ["a", "b"])],
                              [onnx.numpy_helper.from_array(np.array([1], np.int64), "one"),
                               onnx.numpy_helper.from_array(np.array([1, 2], np.int64), "two")])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=functions)


def node(op: str, *inputs: str, output: str = "y", **attributes) -> onnx.NodeProto:
    return helper.make_node(op, inputs or ["x"], [output], **attributes)


FLOAT, HALF, BRAIN = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
NODES = [
    (node("Add", "x", "x"), FLOAT, LOWEST), (node("Cos"), FLOAT, LOWEST), (node("Shape"), FLOAT, LOWEST),
    (node("Cast", to=HALF), FLOAT, LOWEST), (node("Cast", to=HALF, saturate=1), FLOAT, 19), (node("Gelu"), FLOAT, 20),
    (node("Cos"), BRAIN, 22), (node("Softplus"), BRAIN, 22), (node("IsInf"), FLOAT, LOWEST),
    (node("IsInf"), HALF, 20), (node("Split", "x", "two", axis=1), FLOAT, LOWEST),
    (node("Split", num_outputs=1), FLOAT, 18), (node("ReduceMax", "x", "one"), FLOAT, 18),
    (node("ReduceSum", "x", "one"), FLOAT, LOWEST), (node("Pad", "x", "two", mode="edge"), FLOAT, LOWEST),
    (node("Pad", "x", "two", mode="wrap"), FLOAT, 19), (node("Pad", "x", "two", "", "one"), FLOAT, 18),
    (node("ScatterElements", "x", "two", "x", reduction="add"), FLOAT, LOWEST),
    (node("ScatterElements", "x", "two", "x", reduction="max"), FLOAT, 18), (node("HardSwish"), FLOAT, LOWEST),
    (node("RMSNormalization", "x", "x"), FLOAT, 23),
    (node("GroupNormalization", "x", "x", "x", num_groups=1), FLOAT, 21),
]


@pytest.mark.parametrize(("one", "element", "version"), NODES, ids=lambda value: getattr(value, "op_type", None))
def test_a_node_needs_the_version_that_brought_what_it_uses(one, element: int, version: int) -> None:
    model = model_of(one, element=element)
    assert settle_opset(model) == opset_of(model) == version
    assert model.ir_version == min(10, helper.find_min_ir_version_for([helper.make_opsetid("", version)]))


@pytest.mark.parametrize("opset", [17, 18, 21])
def test_a_model_never_gets_a_higher_version_than_it_has(opset: int) -> None:
    model = model_of(node("Add", "x", "x"), opset=opset)
    assert settle_opset(model) == LOWEST
    model = model_of(node("ReduceSumSquare", "x", "one"), opset=max(opset, 18))
    assert settle_opset(model) == 18


def test_the_type_of_a_value_counts_and_not_the_types_of_the_model() -> None:
    inner = [node("Cast", to=FLOAT, output="wide"), node("Cos", "wide", output="cos"), node("Cast", "cos", to=BRAIN)]
    assert settle_opset(model_of(*inner, element=BRAIN)) == LOWEST
    unknown = [helper.make_node("Anything", ["x"], ["a"], domain="local"), node("Cos", "a", output="y")]
    assert settle_opset(model_of(*unknown, element=BRAIN)) == 22, "a value of unknown type can be bf16"


def test_nodes_of_subgraphs_and_functions_count_and_a_function_has_the_model_s_version() -> None:
    branch = helper.make_graph([node("Gelu", output="z")], "b", [], [helper.make_tensor_value_info("z", FLOAT, None)])
    true = helper.make_tensor("t", TensorProto.BOOL, [], [True])
    nodes = [helper.make_node("Constant", [], ["c"], value=true),
             helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    assert settle_opset(model_of(*nodes)) == 20
    body = helper.make_function("local", "F", ["a"], ["b"], [node("Mish", "a", output="b")],
                                [helper.make_opsetid("", 23)])
    model = model_of(helper.make_node("F", ["x"], ["y"], domain="local"), functions=[body])
    assert settle_opset(model) == 18
    assert [entry.version for entry in model.functions[0].opset_import] == [18]
    onnx.checker.check_model(model)


def _definitions(op: str) -> list[onnx.defs.OpSchema]:
    """Those from the table's version to the highest that we write."""
    found = [schema for schema in onnx.defs.get_all_schemas_with_history()
             if schema.name == op and schema.domain == "" and SAME_SINCE[op] <= schema.since_version <= TRACED]
    return sorted(found, key=lambda schema: schema.since_version)


@pytest.mark.parametrize("op", SAME_SINCE)
def test_later_definitions_of_a_listed_op_only_add(op: str) -> None:
    """What a machine can tell: nothing that an earlier definition admits is refused or defaults otherwise later."""
    first, *later = _definitions(op)
    assert first.since_version == SAME_SINCE[op]
    for schema in later:
        for name, attribute in first.attributes.items():
            now = schema.attributes[name]
            assert (attribute.type, attribute.required) == (now.type, now.required)
            assert attribute.default_value.SerializeToString() == now.default_value.SerializeToString(), name
        for name in set(schema.attributes) - set(first.attributes):
            assert not schema.attributes[name].required
        for before, after in ((first.inputs, schema.inputs), (first.outputs, schema.outputs)):
            assert [each.name for each in before] == [each.name for each in after][: len(before)]
            assert all(set(a.types) <= set(b.types) for a, b in zip(before, after))
            assert all(each.option == onnx.defs.OpSchema.FormalParameterOption.Optional
                       for each in after[len(before):])


def test_the_values_that_came_later_are_of_listed_ops() -> None:
    for (op, attribute, _), version in VALUES_SINCE.items():
        assert SAME_SINCE[op] < version
        assert attribute in _definitions(op)[0].attributes


GRAPHS = [("llama", "ort", "growing", 17), ("llama", "ort", "static", 17), ("gpt_oss", "ort", "growing", 17),
           ("llama", "portable", "growing", 18), ("gpt_oss", "portable", "static", 18),
           ("llama", "onnx", "growing", 23), ("llama", "onnx", "static", 24)]


@pytest.mark.whole_model
@pytest.mark.parametrize(("name", "target", "mode", "version"), GRAPHS)
def test_graphs_declare_the_lowest_version(name: str, target: str, mode: str, version: int) -> None:
    model = lowered(name, target, mode).model
    assert opset_of(model) == version
    assert {entry.version for function in model.functions for entry in function.opset_import if not entry.domain} <= {
        version}
    assert model.ir_version == (8 if version < 19 else 10)


def test_graphs_for_tensorrt_keep_the_version_of_the_trace() -> None:
    assert [name for name, target in TARGETS.items() if not target.lowest_opset] == ["trt-plugin", "trt-native"]


@pytest.mark.whole_model
@pytest.mark.parametrize(("name", "target", "overrides"), [
    ("llama", "ort", ()), ("llama", "ort", HEAD_12), ("stablelm", "ort", ()), ("gpt_oss", "ort", ()),
    ("gemma2", "portable", ()), ("gpt_oss", "portable", ()), ("gpt2", "portable", ())])
def test_a_graph_gives_the_same_numbers_at_the_version_it_was_traced_at(name: str, target: str, overrides) -> None:
    _, spec = canonical(name, overrides=overrides)
    lowest = with_weights(lowered(name, target, overrides=overrides).model, eager(name, overrides))
    traced = onnx.ModelProto()
    traced.CopyFrom(lowest)
    for imports in (traced.opset_import, *(function.opset_import for function in traced.functions)):
        for entry in imports:
            entry.version = 23 if not entry.domain else entry.version
    assert opset_of(lowest) < opset_of(traced)
    for node in traced.graph.node:
        assert node.domain or node.op_type in UNREGISTERED or onnx.defs.has(node.op_type, "")
    rows = [[5, 6, 7, 8, 40, 41, 9, 11], [12, 13, 14]]
    low, high = (Decoder(model, spec, "growing", 2) for model in (lowest, traced))
    for step in (rows, [[9], [300]], [[10], [3]]):
        assert np.array_equal(low.step(step), high.step(step), equal_nan=True)
