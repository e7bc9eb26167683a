"""Narrowed rules rewrite as the plain ones do, and are tried at few nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript import rewriter

from gqa_export.graph.rules import narrowed


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
