"""Narrowed rules rewrite as the plain ones do, and are tried at few nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript import rewriter

from gqa_export.errors import GqaExportError
from gqa_export.graph.rules import narrowed, usual_rules
from gqa_export.trace.capture.simplify import simplify


def model(length: int = 20) -> ir.Model:
    """A chain in which every second node can go: Casts to the type that is there, and double Transposes."""
    x = ir.Input("x", ir.Shape([2, 3]), ir.TensorType(ir.DataType.FLOAT))
    value, nodes = x, []
    rng = np.random.default_rng(3)
    for _ in range(length):
        kind = rng.choice(["Cast", "Transpose", "Tanh", "Flatten"])
        attrs = {"Cast": {"to": int(ir.DataType.FLOAT)}, "Transpose": {"perm": [1, 0]}}.get(str(kind), {})
        node = ir.node(str(kind), [value], attrs)
        value = node.outputs[0]
        value.type, value.shape = x.type, x.shape
        nodes.append(node)
    return ir.Model(ir.Graph([x], [value], nodes=nodes, opset_imports={"": 23}, name="chain"), ir_version=10)


def ops(rewritten: ir.Model) -> list[tuple[str, str]]:
    return [(node.op_type, str(dict(node.attributes))) for node in rewritten.graph]


def test_narrowed_rules_give_the_graph_of_the_plain_ones():
    plain, quick = rewriter.rewrite(model()), rewriter.rewrite(model(), narrowed(rewriter._DEFAULT_REWRITE_RULES))
    assert ops(plain) == ops(quick)
    assert len(ops(quick)) < 20


def test_a_rule_is_tried_only_where_its_last_op_stands(monkeypatch):
    tried = []
    rule = next(rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name == "TransposeTranspose")
    monkeypatch.setattr(rule, "try_rewrite", lambda model, graph, node, **options: tried.append(node.op_type))
    graph = model()
    narrowed([rule]).apply_to_model(graph)
    assert tried == [node.op_type for node in graph.graph if node.op_type == "Transpose"] != []


@pytest.mark.parametrize("rule", rewriter._DEFAULT_REWRITE_RULES, ids=lambda rule: str(rule))
def test_every_usual_rule_can_be_narrowed(rule):
    (quick,) = narrowed([rule]).rules
    assert quick is not rule, "onnxscript changed what a pattern is called: exports are slower again"


def number(op: str, value: float, dtype=np.float32, *, first: bool = False) -> ir.Model:
    """`x op value` (or `value op x`), the value a constant of the graph."""
    element = ir.DataType.from_numpy(np.dtype(dtype))
    x = ir.Input("x", ir.Shape([2, 3]), ir.TensorType(element))
    constant = ir.node("Constant", [], {"value": ir.tensor(np.array(value, dtype))}, name="constant")
    constant.outputs[0].const_value = ir.tensor(np.array(value, dtype))
    both = [constant.outputs[0], x] if first else [x, constant.outputs[0]]
    node = ir.node(op, both, name="node")
    node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
    graph = ir.Graph([x], node.outputs, nodes=[constant, node], opset_imports={"": 23}, name="number")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("first", [False, True], ids=["x op c", "c op x"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Pow"])
@pytest.mark.parametrize("value", [1e-8, -1e-8, 1e-12, 1e-30, 1 + 1e-6, 1 - 1e-6, 2 + 1e-5, 1 + 3e-7])
def test_a_constant_that_is_only_near_a_patterns_number_survives(op, value, dtype, first):
    graph = number(op, value, dtype, first=first)
    simplify(graph)
    assert [node.op_type for node in graph.graph] == [op]


@pytest.mark.parametrize(("op", "value"), [("Add", 0.0), ("Sub", 0.0), ("Mul", 1.0), ("Div", 1.0)])
def test_a_constant_that_is_the_patterns_number_goes(op, value):
    graph = number(op, value)
    simplify(graph)
    assert [node.op_type for node in graph.graph] in ([], ["Identity"])


def test_the_third_partys_own_rules_are_left_as_they_are():
    usual_rules()
    assert ops(rewriter.rewrite(number("Add", 1e-9))) in ([], [("Identity", "{}")]), \
        "onnxscript compares constants exactly now: graph/rules.py need not"


def test_rules_in_another_form_are_an_error_and_not_a_silent_fall_back(monkeypatch):
    with pytest.raises(GqaExportError) as refusal:
        narrowed([object()])
    assert refusal.value.code == "E-ENV-ONNXSCRIPT"
    monkeypatch.delattr(rewriter, "_DEFAULT_REWRITE_RULES")
    with pytest.raises(GqaExportError) as refusal:
        usual_rules()
    assert refusal.value.code == "E-ENV-ONNXSCRIPT"
