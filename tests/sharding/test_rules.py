"""What has no rule is refused by the name of the operator; what has one is cut where it should be."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from gqa_export.sharding.facts import CannotShard, Cut, even
from gqa_export.sharding.spread import Cuts
from gqa_export.sharding.view import View

HEADS = Cut(2, even(4, 2))


def view(nodes, shapes, constants=()):
    """A graph whose inputs are those names that no node gives."""
    given = {name for node in nodes for name in node.output}
    known = {tensor.name for tensor in constants}
    infos = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(nodes, "g", [info for name, info in infos.items() if name not in given | known],
                              [], list(constants), value_info=[info for name, info in infos.items() if name in given])
    return View(helper.make_model(graph))


def weight(name, *dims):
    return TensorProto(name=name, dims=dims, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)


def numbers(name, *values):
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


@pytest.mark.parametrize(("op", "attributes"), [
    ("Softmax", {"axis": 2}), ("TopK", {}), ("CumSum", {}), ("LayerNormalization", {"axis": -2}), ("Einsum", {}),
    ("Concat", {"axis": 2}), ("ReduceMax", {}), ("Shape", {}), ("GatherElements", {"axis": 2})])
def test_an_operator_along_the_cut_axis_is_refused_by_name(op, attributes):
    shape = ["b", "s", 4, 8]
    axes = [numbers("axes", 2)] if op == "ReduceMax" else []
    node = helper.make_node(op, ["y", *(tensor.name for tensor in axes)], ["z"], name="here", **attributes)
    there = view([helper.make_node("Neg", ["w"], ["y"], name="neg"), node], {"y": shape, "z": shape},
                 [weight("w", 1, 1, 4, 8), *axes])
    with pytest.raises(CannotShard) as refusal:
        Cuts(there).spread({"y": HEADS})
    assert op in refusal.value.node
    assert "here" in refusal.value.node


def test_an_input_of_the_graph_is_not_cut():
    there = view([helper.make_node("Neg", ["x"], ["y"], name="neg")], {"x": ["b", 4], "y": ["b", 4]})
    with pytest.raises(CannotShard, match="'x'"):
        Cuts(there).spread({"y": Cut(1, even(4, 2))})


def test_a_packed_matrix_is_cut_in_each_of_its_parts():
    """Rows of queries, keys and values in one matrix; the keys' and values' one head is whole on every rank."""
    nodes = [helper.make_node("Transpose", ["w"], ["t"], name="t", perm=[1, 0]),
             helper.make_node("MatMul", ["x", "t"], ["packed"], name="mm"),
             helper.make_node("Split", ["packed", "sizes"], ["q", "k", "v"], name="split", axis=2)]
    there = view(nodes, {"x": ["b", "s", 6], "t": [6, 48], "packed": ["b", "s", 48], "q": ["b", "s", 32],
                         "k": ["b", "s", 8], "v": ["b", "s", 8]}, [weight("w", 48, 6), numbers("sizes", 32, 8, 8)])
    cuts = Cuts(there)
    cuts.spread({"q": Cut(2, even(32, 2))})
    assert cuts.known["w"] == Cut(0, (((0, 16), (32, 48)), ((16, 48),)))
    assert cuts.known["q"] == Cut(2, even(32, 2))
    assert "k" not in cuts.known


def test_entries_written_by_an_index_are_cut_along_the_other_axes():
    """Halves of a head's size put together by ScatterND, as DeepSeek's keys are."""
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["empty"], name="empty"),
             helper.make_node("ScatterND", ["empty", "index", "w"], ["y"], name="scatter")]
    there = view(nodes, {"empty": [8, 4, "s"], "y": [8, 4, "s"], "index": [3, 1]},
                 [weight("w", 3, 4, 5), numbers("shape", 8, 4, 5)])
    cuts = Cuts(there)
    cuts.spread({"y": Cut(1, even(4, 2))})
    assert cuts.known == dict.fromkeys(("y", "empty", "w"), Cut(1, even(4, 2)))
    with pytest.raises(CannotShard, match="writes along"):
        Cuts(there).spread({"y": Cut(0, even(8, 2))})


def test_a_part_that_overlaps_another_is_refused():
    nodes = [helper.make_node("Neg", ["w"], ["y"], name="neg"),
             *(helper.make_node("Slice", ["y", start, stop, "axis"], [out], name=out)
               for out, start, stop in (("a", "zero", "six"), ("b", "four", "eight")))]
    there = view(nodes, {"y": [8], "a": [6], "b": [4]}, [weight("w", 8), numbers("zero", 0), numbers("six", 6),
                                                         numbers("four", 4), numbers("eight", 8), numbers("axis", 0)])
    with pytest.raises(CannotShard, match="overlap"):
        Cuts(there).spread({"a": Cut(0, even(6, 2))})


def test_a_sum_over_entries_that_two_ranks_hold_is_refused():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")]
    there = view([helper.make_node("Neg", ["z"], ["x"], name="n"), *nodes],
                 {"x": ["b", 8], "y": ["b", 3]}, [weight("w", 8, 3), weight("z", 1, 8)])
    with pytest.raises(CannotShard, match="several ranks"):
        Cuts(there).spread({"x": Cut(1, (((0, 4), (4, 8)), ((0, 4),)))})


def test_what_cannot_be_cut_leaves_nothing_behind():
    nodes = [helper.make_node("Neg", ["w"], ["y"], name="neg"),
             helper.make_node("CumSum", ["y", "axis"], ["z"], name="c")]
    there = view(nodes, {"y": ["b", 4], "z": ["b", 4]}, [weight("w", 1, 4), numbers("axis", 1)])
    cuts = Cuts(there)
    reason = cuts.attempt({"y": Cut(1, even(4, 2))})
    assert reason is not None
    assert "CumSum" in str(reason)
    assert cuts.known == {}


def test_the_rules_name_operators_of_the_standard():
    from gqa_export.sharding.rules import RULES

    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert set(RULES) - known <= {"RMSNormalization", "Swish"}
