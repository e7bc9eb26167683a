"""One node of a small graph is broken: the lowering names it and the condition that does not hold there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from refusal import refused

from gqa_export import attention_op
from gqa_export.errors import UnsupportedModel
from gqa_export.graph.passes import NearMiss, check_order, run_passes
from gqa_export.lowering import portable
from gqa_export.lowering.context import Context, Lowered, LowerOptions
from gqa_export.lowering.lower import lower
from gqa_export.lowering.onnx import passes as onnx_passes
from gqa_export.lowering.ort import passes as ort_passes
from gqa_export.lowering.prepare import INFER
from gqa_export.lowering.tensorrt import native, plugin
from gqa_export.targets import TARGETS

from .whole_model import CAPACITY, canonical

Break = Callable[[onnx.ModelProto], str]
"""changes a canonical model; returns the name of the node that it broke"""
LISTS = {"ort": ort_passes, "onnx": onnx_passes, "portable": portable, "trt-plugin": plugin, "trt-native": native}


def broken(target: str, change: Break, name: str = "llama") -> tuple[str, Lowered]:
    """The node that was broken, and the model lowered all the same."""
    original, spec = canonical(name)
    model = onnx.ModelProto()
    model.CopyFrom(original)
    node = change(model)
    return node, lower(model, spec, LowerOptions(target, "growing", CAPACITY))


def first(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op)


def other_constant(model: onnx.ModelProto, node: onnx.NodeProto, place: int, value: np.ndarray) -> str:
    node.input[place] = f"{node.name}/other"
    model.graph.initializer.append(numpy_helper.from_array(value, node.input[place]))
    return node.name


def cube(model: onnx.ModelProto) -> str:
    return other_constant(model, first(model, "Pow"), 1, np.float32(3))


def other_root(model: onnx.ModelProto) -> str:
    node = first(model, "Sqrt")
    node.op_type = "Exp"
    return node.name


def absolute_square(model: onnx.ModelProto) -> str:
    node = first(model, "Pow")
    node.op_type = "Abs"
    del node.input[1:]
    return node.name


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize(("change", "word"), [(cube, None), (other_root, "Exp"), (absolute_square, "Abs")])
def test_a_norm_that_is_not_fused_is_named_by_the_node_that_departs(target: str, change: Break, word: str | None):
    step = {"ort": "fuse_norms", "onnx": "fuse_rms_norm"}[target]
    node, found = broken(target, change)
    _, sound = broken(target, lambda model: "")
    (miss,) = [miss for miss in found.near_misses if miss.step == step]
    assert miss.reason
    if word:
        assert miss.node == node
        assert word in miss.reason
    elif target == "onnx":
        assert miss == NearMiss(node, "the exponent is not 2", step)
    assert found.counts[step] == sound.counts[step] - 1
    assert not [miss for miss in sound.near_misses if miss.step == step]


def added_to_the_rotation(model: onnx.ModelProto) -> str:
    """Neg of the turned half becomes Abs: no longer a rotation. Returns the Add of the two products."""
    neg = first(model, "Neg") if first(model, "Neg").name.startswith("layers") else next(
        node for node in model.graph.node if node.op_type == "Neg" and "self_attn" in node.name)
    neg.op_type = "Abs"
    readers = {name: node for node in model.graph.node for name in node.input}
    node = neg
    while node.op_type != "Add":
        node = readers[node.output[0]]
    return node.name


def test_a_rotation_that_is_not_fused_is_named_with_its_reason():
    node, found = broken("onnx", added_to_the_rotation)
    (miss,) = [miss for miss in found.near_misses if miss.step == "fuse_rotary"]
    assert miss.node == node
    assert "negated second half" in miss.reason


def test_a_rotation_that_stays_outside_attention_is_named_and_remarked():
    _, found = broken("ort", added_to_the_rotation)
    (miss,) = [miss for miss in found.near_misses if miss.step == "rotary_inside"]
    assert "layers.0." in miss.node
    assert found.remarks == (f"layer 0: {miss.reason}",)


def test_projections_that_are_not_packed_are_named_with_their_reason():
    def scaled(model: onnx.ModelProto) -> str:
        """The values of layer 0 are the projection's, negated."""
        call = next(node for node in model.graph.node if node.op_type == attention_op.OP)
        place = attention_op.input_index("value")
        node = helper.make_node("Neg", [call.input[place]], ["negated"], name="layers.0.self_attn/Neg_value")
        call.input[place] = "negated"
        model.graph.node.insert(list(model.graph.node).index(call), node)
        return node.name

    node, found = broken("ort", scaled)
    (miss,) = [miss for miss in found.near_misses if miss.step == "packed_projections"]
    assert miss.node == node
    assert "value" in miss.reason
    assert "Neg" in miss.reason


def renamed_call(model: onnx.ModelProto) -> str:
    call = [node for node in model.graph.node if node.op_type == attention_op.OP][-1]
    call.op_type = "SomethingElse"
    return call.name


@pytest.mark.parametrize("target", LISTS)
def test_a_missing_attention_is_named_by_the_node_in_its_place(target: str):
    model, spec = canonical("llama", "static", logits="last")
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    name = renamed_call(changed)
    graph, context = _imported(changed, spec, target)
    with refused("E-GRAPH-PASS-COUNT", UnsupportedModel) as refusal:
        run_passes(graph, _attention_only(target), context, context.log)
    assert f"rewrote {len(spec.layers) - 1} nodes, expected {len(spec.layers)}" in refusal.error.what
    assert repr(name) in refusal.error.what
    assert "SomethingElse" in refusal.error.what


def test_a_guard_that_is_not_found_is_named():
    def multiplied(model: onnx.ModelProto) -> str:
        made = {name: node for node in model.graph.node for name in node.output}
        node = next(node for node in model.graph.node if node.op_type == "Add" and any(
            made.get(name) is not None and made[name].op_type == "Unsqueeze"
            and made[made[name].input[0]].op_type == "Where" for name in node.input if made.get(name)
            and made[name].input and made[name].input[0] in made))
        node.op_type = "Mul"
        return node.name

    model, spec = canonical("llama")
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    name = multiplied(changed)
    with refused("E-GRAPH-PASS-COUNT") as refusal:
        lower(changed, spec, LowerOptions("ort", "growing", CAPACITY))
    assert refusal.error.what.startswith("lean_guard rewrote 0 nodes, expected 1")
    assert repr(name) in refusal.error.what


@pytest.mark.parametrize("target", LISTS)
def test_the_list_of_a_target_is_in_order_and_reversed_it_is_refused(target: str):
    dialect = LISTS[target]
    names = [step.name for step in (INFER, *(dialect.PREPARE or ()), *dialect.PASSES)]
    assert len(names) == len(set(names))
    check_order([INFER, *(dialect.PREPARE or ()), *dialect.PASSES])
    if any(step.requires for step in dialect.PASSES):  # not the two checks of portable, which stand for themselves
        with refused("E-GRAPH-PASS-ORDER"):
            check_order([INFER, *(dialect.PREPARE or ()), *reversed(dialect.PASSES)])


@pytest.mark.parametrize("target", LISTS)
def test_every_pass_has_a_docstring_and_requires_passes_that_exist(target: str):
    dialect = LISTS[target]
    steps = [INFER, *(dialect.PREPARE or ()), *dialect.PASSES]
    for step in steps:
        assert step.function.__doc__
        assert step.ensures is None or step.ensures.__doc__
        assert set(step.requires) <= {other.name for other in steps}


def test_a_call_that_a_lowering_leaves_is_an_error_of_its_promise():
    """`lower_attention` counts what it must, but a call of a layer that did not fall back is still there."""
    from dataclasses import replace

    model, spec = canonical("llama")
    graph, context = _imported(model, spec, "onnx")
    (step,) = _attention_only("onnx")
    idle = replace(step, function=lambda graph, context: len(context.spec.layers))
    with refused("E-GRAPH-PASS-PROMISE", UnsupportedModel) as refusal:
        run_passes(graph, [idle], context, context.log)
    assert "layers.0." in refusal.error.what


def _attention_only(target: str) -> list:
    """The pass of a target that finds attention, as if all that it requires had run."""
    from dataclasses import replace

    step = next(step for step in LISTS[target].PASSES if step.name in ("lower_attention", "check_attention"))
    return [replace(step, requires=())]


def _imported(model: onnx.ModelProto, spec, target: str):
    """The graph as passes see it, and their context."""
    from gqa_export.graph import edit

    options = LowerOptions(target, "static", CAPACITY, "last")
    graph = edit.load(model)
    context = Context(spec, TARGETS[target], options, model)
    first_pass = SimpleNamespace(list=getattr(LISTS[target], "FIRST", []))
    for step in first_pass.list:
        if step.name == "literal_capacity":
            step.function(graph, context)
    return graph, context
