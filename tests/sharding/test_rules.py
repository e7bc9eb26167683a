"""What has no rule is refused by the name of the operator; what has one is cut where it should be."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from gqa_export.sharding.entries import plain_entries
from gqa_export.sharding.facts import CannotShard, Cut, even
from gqa_export.sharding.plan import Plan, cut_experts
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


def test_layers_that_share_a_tensor_are_cut_together():
    """The cut of one layer reaches the other's queries by the slopes that both read, before its values are known."""
    nodes = [helper.make_node("Add", ["first", "slopes"], ["a"], name="a"),
             helper.make_node("Split", ["packed", "sizes"], ["q", "v"], name="split", axis=2),
             helper.make_node("MatMul", ["x", "t"], ["packed"], name="mm"),
             helper.make_node("Transpose", ["w"], ["t"], name="t", perm=[1, 0]),
             helper.make_node("Add", ["q", "slopes"], ["b"], name="b")]
    shape = ["b", "s", 16]
    there = view(nodes, {**dict.fromkeys(("a", "b", "q", "v"), shape), "packed": ["b", "s", 32], "x": ["b", "s", 6],
                         "t": [6, 32]},
                 [weight("w", 32, 6), weight("first", 1, 1, 16), weight("slopes", 1, 1, 16), numbers("sizes", 16, 16)])
    halves = Cut(2, even(16, 2))
    one_by_one = Cuts(there)
    one_by_one.spread({"a": halves})
    with pytest.raises(CannotShard, match="cut and whole at once"):
        one_by_one.spread({"b": halves, "v": halves})
    cuts = Cuts(there)
    cuts.spread({"a": halves}, {"b": halves, "v": halves})
    assert cuts.known["w"] == Cut(0, (((0, 8), (16, 24)), ((8, 16), (24, 32))))


def picking(*indices):
    """A packed tensor [B, S, 6, D] whose entries are picked after a Transpose, as Falcon's key and value are."""
    nodes = [helper.make_node("Transpose", ["packed"], ["turned"], name="turn", perm=[2, 0, 1, 3])]
    constants = []
    for place, index in enumerate(indices):
        constants.append(helper.make_tensor(f"i{place}", TensorProto.INT64, [len(index), 1], index))
        nodes.append(helper.make_node("GatherND", ["turned", f"i{place}"], [f"o{place}"], name=f"pick{place}"))
    infos = [helper.make_tensor_value_info(f"o{place}", TensorProto.FLOAT, None) for place in range(len(indices))]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("packed", TensorProto.FLOAT, [2, 3, 6, 5])],
                              infos, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def test_entries_picked_by_constants_are_slices_with_the_same_values():
    model = picking([-2], [-1], [1, 2], [-3, -2])
    packed = np.random.default_rng(3).standard_normal((2, 3, 6, 5)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"packed": packed})
    plain = plain_entries(picking([-2], [-1], [1, 2], [-3, -2]))
    assert [node.op_type for node in plain.graph.node] == ["Slice", "Transpose"] * 4
    for found, wanted in zip(ReferenceEvaluator(plain).run(None, {"packed": packed}), expected, strict=True):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("indices", [[[2, 1]], [[-1, 0]], [[0], [3, 5]]], ids=["backwards", "around", "a gap"])
def test_entries_that_are_no_slice_stay_as_they_are(indices):
    before = picking(*indices).SerializeToString()
    assert plain_entries(picking(*indices)).SerializeToString() == before


def test_matrices_of_one_choice_are_cut_by_the_same_experts():
    """One has two entries more, which are never picked: LongCat's experts that compute nothing."""
    nodes = [helper.make_node("TopK", ["scores", "two"], ["best", "index"], name="topk"),
             helper.make_node("Unsqueeze", ["index", "last"], ["a"], name="a"),
             helper.make_node("Clip", ["index"], ["clip"], name="clip"),
             helper.make_node("Unsqueeze", ["clip", "last"], ["b"], name="b"),
             helper.make_node("GatherND", ["up", "a"], ["u"], name="u"),
             helper.make_node("GatherND", ["down", "b"], ["d"], name="d")]
    there = view(nodes, {"scores": ["t", 6], "best": ["t", 2], "index": ["t", 2], "clip": ["t", 2], "a": ["t", 2, 1],
                         "b": ["t", 2, 1], "u": ["t", 2, 8, 4], "d": ["t", 2, 4, 8]},
                 [weight("up", 6, 8, 4), weight("down", 4, 4, 8), numbers("two", 2), numbers("last", -1)])
    plan, cuts = Plan(there, None, 2), Cuts(there)
    cut_experts(plan, cuts)
    assert cuts.known == dict.fromkeys(("up", "down"), Cut(0, even(4, 2)))
