"""Looking around in a graph and changing it, without a look at any weight."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx_graphsurgeon.ir.tensor import LazyValues
from refusal import refused

from gqa_export.graph import edit, match

from . import small


@pytest.fixture
def graph() -> gs.Graph:
    return edit.load(small.model())


def by_name(graph: gs.Graph, name: str) -> gs.Node:
    return next(node for node in graph.nodes if node.name == name)


def test_a_round_trip_changes_nothing_and_loads_no_weight(graph):
    model = edit.save(graph)
    assert [node.name for node in model.graph.node] == [node.name for node in small.model().graph.node]
    assert {t.name: t for t in model.graph.initializer} == {t.name: t for t in small.model().graph.initializer}
    assert model.ir_version == 10


def test_weights_are_told_from_constants_and_give_no_value(graph):
    weight, two = by_name(graph, "a/Transpose_0").inputs[0], by_name(graph, "a/Mul_0").inputs[1]
    assert match.is_weight(weight)
    assert match.const_value(weight) is None
    assert match.recipe(weight) == "a.weight"
    assert isinstance(weight._values, LazyValues), "looking at it must not load it"
    assert not match.is_weight(two)
    assert match.recipe(two) == ""
    assert match.is_scalar(two, 2)
    assert isinstance(two._values, LazyValues)


def test_bf16_constants_are_read_as_fp32_and_stored_as_bf16():
    constant = edit.constant("half", np.array([0.5, 3.0], np.float32), onnx.TensorProto.BFLOAT16)
    value = match.const_value(constant)
    assert value is not None
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, [0.5, 3.0])
    assert constant._values.tensor.data_type == onnx.TensorProto.BFLOAT16
    assert len(constant._values.tensor.raw_data) == 4


def test_constant_nodes_are_read_in_every_spelling():
    for attrs, wanted in (({"value_int": 7}, 7), ({"value_floats": [1.0, 2.0]}, [1.0, 2.0]),
                          ({"value": gs.Constant("c", np.array([4]))}, [4])):
        node = gs.Node("Constant", "c", attrs, [], [gs.Variable("c.0")])
        np.testing.assert_array_equal(match.const_value(node.outputs[0]), wanted)


def test_producers_consumers_and_the_way_back(graph):
    product, relu = by_name(graph, "a/MatMul_0"), by_name(graph, "a/Relu_0")
    assert match.produced_by(relu.inputs[0], "Add") is by_name(graph, "a/Add_0")
    assert match.produced_by(relu.inputs[0], "Sub") is None
    assert match.producer(product.inputs[0]) is None
    assert match.consumers(relu.outputs[0]) == [by_name(graph, "a/Mul_0")]
    assert match.sole_consumer(graph, relu.outputs[0]) is None, "it is an output too"
    assert match.sole_consumer(graph, product.outputs[0]) is by_name(graph, "a/Add_0")


def test_upstream_stops_where_it_is_told_and_lists_what_enters(graph):
    output, middle = by_name(graph, "a/Mul_0").outputs[0], by_name(graph, "a/MatMul_0").outputs[0]
    nodes, border = match.upstream([output])
    assert [node.op for node in nodes] == ["Transpose", "MatMul", "Add", "Relu", "Mul"]
    assert [tensor.name for tensor in border] == ["x"]
    nodes, border = match.upstream([output], [middle])
    assert [node.op for node in nodes] == ["Add", "Relu", "Mul"]
    assert border[0] is middle


def test_a_missing_graph_input_is_refused(graph):
    with refused("E-GRAPH-INPUT"):
        match.only_input(graph, "attention_mask")


def test_a_joined_weight_is_a_recipe_with_the_shape_of_the_whole(graph):
    joined = edit.new_weight("joined", "a.weight+c.weight", np.float32, [8, 4])
    product = by_name(graph, "a/MatMul_0")
    product.inputs[1] = joined
    product.op, product.domain, product.attrs = "FusedMatMul", "com.microsoft", {"transB": 1}
    model = edit.save(graph)
    tensor = next(t for t in model.graph.initializer if t.name == "joined")
    assert tensor == small.weight("joined", [8, 4], "weights:a.weight+c.weight")
    assert "W" not in [t.name for t in model.graph.initializer]
    assert {opset.domain for opset in model.opset_import} == {"", "com.microsoft"}


def test_replacing_a_graph_output_keeps_its_name_and_its_readers(graph):
    relu = by_name(graph, "a/Relu_0")
    y = relu.outputs[0]
    new = edit.add_node(graph, "Abs", [relu.inputs[0]], name="a/Abs_0")[0]
    edit.replace_uses(graph, y, new)
    model = edit.save(graph)
    ops = {node.op_type: node for node in model.graph.node}
    assert "Relu" not in ops
    assert list(ops["Abs"].output) == ["y"]
    assert ops["Mul"].input[0] == "y"


def test_inputs_left_out_at_the_end_are_not_written_and_inner_ones_are_empty(graph):
    x = match.only_input(graph, "x")
    out = edit.add_node(graph, "Any", [x, None, x, None], name="any", domain="test")[0]
    node = match.producer(out)
    assert node is not None
    assert [tensor.name for tensor in node.inputs] == ["x", "", "x"]


def test_removed_nodes_are_dropped_and_counted(graph):
    graph.outputs.pop()
    assert edit.tidy(graph) == 1
    assert "Mul" not in [node.op for node in graph.nodes]
