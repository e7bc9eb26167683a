"""The state ops in the dialect of each target against the fp64 reference, in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from gqa_export.lowering.ort import states as ort_states
from gqa_export.state_ops import CAUSAL_CONV, LINEAR_ATTENTION

from .one_state_op import (
    CASES,
    HALVES,
    assert_same,
    in_type,
    label,
    lowered,
    op_model,
    run,
    widened,
)

PASSES = {"ort": ort_states.lower_states}
FUSED = {"ort": {"com.microsoft::LinearAttention", "com.microsoft::CausalConvWithState"}}
RUNTIME = {"ort": None}


def dialect(target, case, model=None):
    """A case in the dialect of a target, on the runtime that is installed."""
    op, feeds, attributes = case
    model = op_model(op, feeds, attributes) if model is None else model
    return lowered(op, model, feeds, target, PASSES[target], RUNTIME[target])


def fused_ops(model):
    return {f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain}


@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.parametrize("target", PASSES)
def test_fused_operator_equals_the_fp64_reference(target, case):
    op, feeds, attributes = case
    model = dialect(target, case)
    assert fused_ops(model) <= FUSED[target]
    assert any(op.name in name for name in fused_ops(model)), "it is not fused"
    assert_same(op, run(model, feeds), feeds, attributes)


@pytest.mark.parametrize("case", [CASES[3], CASES[-6]], ids=label)
def test_states_stay_fp32_where_activations_are_fp16(case):
    op, feeds, attributes = case
    feeds = in_type(feeds, TensorProto.FLOAT16)
    actual = run(dialect("ort", (op, feeds, attributes)), feeds)
    assert (actual[0].dtype, actual[1].dtype) == (np.float16, np.float32)
    assert_same(op, actual, widened(feeds), attributes, output_unit=HALVES[TensorProto.FLOAT16])


@pytest.mark.parametrize("case", [CASES[3], CASES[-6]], ids=label)
def test_a_runtime_without_the_operator_gets_the_body(case):
    op, feeds, attributes = case
    model = lowered(op, op_model(op, feeds, attributes), feeds, "ort", ort_states.lower_states, frozenset())
    assert not fused_ops(model)
    assert_same(op, run(model, feeds), feeds, attributes)


def test_a_stored_kernel_is_used_as_it_lies():
    """Conv1d keeps [C, 1, K]; the op takes [C, K]: the Squeeze between is not turned into an Unsqueeze behind it."""
    op, feeds, attributes = CASES[-6]
    model = op_model(op, feeds, attributes)
    weight = next(value for value in model.graph.input if value.name == "weight")
    weight.CopyFrom(onnx.helper.make_tensor_value_info("weight", TensorProto.FLOAT, [5, 1, 4]))
    model.graph.node[0].input[1] = "flat"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axis"))
    model.graph.node.insert(0, onnx.helper.make_node("Squeeze", ["weight", "axis"], ["flat"], name="squeeze"))
    flat = dialect("ort", CASES[-6], model)
    assert not {"Squeeze", "Unsqueeze"} & {node.op_type for node in flat.graph.node if "weight" in node.name}
    assert_same(op, run(flat, {**feeds, "weight": feeds["weight"][:, None]}), feeds, attributes)


def node_of(model, suffix):
    found = [node for node in model.graph.node if node.name.endswith(suffix)]
    assert len(found) == 1, f"{len(found)} nodes end with {suffix}"
    return found[0]


def unmask(label):
    """Let what is padded through where a Where keeps it out."""
    def change(model):
        node = node_of(model, label)
        node.op_type, kept = "Identity", node.input[1]
        node.input[:] = [kept]
    return change


def other_rule(model):
    """The decay is given, and not used."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "update_rule":
                attribute.s = {b"gated": b"linear", b"gated_delta": b"delta"}.get(attribute.s, attribute.s)


def beta_of_another_head(model):
    node = node_of(model, "beta/real")
    heads = onnx.numpy_helper.from_array(np.array([1, 2, 3, 0]), "turned_heads")
    model.graph.initializer.append(heads)
    turned = onnx.helper.make_node("Gather", [node.input[1], heads.name], ["turned_beta"], axis=2, name="turned_beta")
    node.input[1] = "turned_beta"
    model.graph.node.insert(0, turned)


def state_kept(model):
    """What goes out is what came in."""
    state = next(value.name for value in model.graph.input if "past_key_values" in value.name)
    output = model.graph.output[1].name
    for node in model.graph.node:
        node.output[:] = ["lost_state" if name == output else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Identity", [state], [output], name="kept"))


def state_transposed(model):
    output = model.graph.output[1].name
    for node in model.graph.node:
        node.output[:] = ["straight" if name == output else name for name in node.output]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 0, 8, 6]), "whole"))
    model.graph.node.extend([
        onnx.helper.make_node("Transpose", ["straight"], ["turned"], perm=[0, 1, 3, 2], name="turn"),
        onnx.helper.make_node("Reshape", ["turned", "whole"], [output], name="whole")])


def conv_state_shifted(model):
    taps = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(".taps"))
    taps.CopyFrom(onnx.numpy_helper.from_array(np.maximum(onnx.numpy_helper.to_array(taps) - 1, 0), taps.name))


def conv_state_of_the_padded_end(model):
    node = next(node for node in model.graph.node if model.graph.output[1].name in node.output)
    node.op_type, node.input[:] = "Identity", [node_of(model, "/fused").output[1]]
    del node.attribute[:]


def no_activation(model):
    for attribute in node_of(model, "/fused").attribute:
        if attribute.name == "activation":
            attribute.s = b"none"


MUTATIONS = {
    "keys leak at the padding": unmask("key/real"), "values leak at the padding": unmask("value/real"),
    "decay at the padding": unmask("decay/real"), "beta at the padding": unmask("beta/real"),
    "rows at the padding": unmask("output/real"), "decay dropped": other_rule,
    "beta of the wrong head": beta_of_another_head, "state not written back": state_kept,
    "state transposed": state_transposed}
CONV_MUTATIONS = {
    "output at the padding": unmask("call/output"), "state shifted by one": conv_state_shifted,
    "state of the padded end": conv_state_of_the_padded_end, "state not written back": state_kept,
    "SiLU dropped": no_activation}


@pytest.mark.parametrize("target", PASSES)
@pytest.mark.parametrize(("op", "name"), [*((LINEAR_ATTENTION, name) for name in MUTATIONS),
                                          *((CAUSAL_CONV, name) for name in CONV_MUTATIONS)],
                         ids=lambda value: getattr(value, "name", value))
def test_a_mutated_lowering_is_caught(target, op, name):
    case = next(case for case in CASES if case[0] is op and case[2] in ({"rule": 3, "scale": 0.3}, {"activation": 1}))
    _, feeds, attributes = case
    model = dialect(target, case)
    assert_same(op, run(model, feeds), feeds, attributes)
    (MUTATIONS if op is LINEAR_ATTENTION else CONV_MUTATIONS)[name](model)
    with pytest.raises(AssertionError):
        assert_same(op, run(model, feeds), feeds, attributes)
