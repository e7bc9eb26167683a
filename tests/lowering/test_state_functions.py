"""The bodies of the state ops against the fp64 reference, through ONNX Runtime and onnx.reference."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from refusal import refused

from gqa_export.errors import UnsupportedModel
from gqa_export.lowering import state_functions
from gqa_export.state_ops import CAUSAL_CONV, LINEAR_ATTENTION, RULES, STATE_OPS

from .one_state_op import (
    CASES,
    HALVES,
    assert_same,
    conv_feeds,
    fed_in_fp32,
    in_type,
    inputs_of,
    label,
    linear_feeds,
    op_model,
    run,
    widened,
)


@pytest.mark.parametrize("op", STATE_OPS, ids=lambda op: op.name)
def test_function_has_the_inputs_outputs_and_attributes_in_order(op):
    function = state_functions.function_proto(op, 23)
    assert (function.domain, function.name) == ("gqa", op.name)
    assert tuple(function.input) == op.input_names
    assert tuple(function.output) == op.output_names
    assert tuple(function.attribute) == op.attribute_names
    assert not function.attribute_proto, "an attribute with a default could be left out of a call"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_body_equals_the_fp64_reference_in_onnxruntime(case):
    op, feeds, attributes = case
    assert_same(op, run(state_functions.inline(op_model(op, feeds, attributes)), feeds), feeds, attributes)


@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx.reference"])
def test_body_in_fp64_is_exact(case, runtime):
    op, feeds, attributes = case
    wide = {name: value if value.dtype == np.int64 else value.astype(np.float64) for name, value in feeds.items()}
    model = state_functions.inline(op_model(op, wide, attributes))
    if runtime == "onnxruntime":
        actual = run(model, wide)
    else:
        with np.errstate(all="ignore"):  # it computes what is padded too
            actual = onnx.reference.ReferenceEvaluator(model).run(
                None, inputs_of(model.graph.input, wide))
    assert_same(op, actual, wide, attributes, unit=2.0 ** -53)


@pytest.mark.parametrize("element", list(HALVES), ids=TensorProto.DataType.Name)
@pytest.mark.parametrize("case", [CASES[3], CASES[5], CASES[-6]], ids=label)
def test_states_stay_fp32_where_activations_are_halves(case, element):
    op, feeds, attributes = case
    feeds = in_type(feeds, element)
    model = state_functions.inline(fed_in_fp32(op_model(op, feeds, attributes), element))
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.output[1].type.tensor_type.elem_type == TensorProto.FLOAT
    actual = run(model, widened(feeds))
    assert_same(op, actual, widened(feeds), attributes, output_unit=HALVES[element])


@st.composite
def linear_calls(draw):
    rule = draw(st.sampled_from(RULES))
    shared = draw(st.sampled_from([(1, 1, 1), (1, 1, 4), (2, 4, 4), (3, 2, 6), (4, 4, 4)]))
    steps = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(0, steps), min_size=1, max_size=4))
    feeds = linear_feeds(rule, lengths, steps=steps, heads=shared, per_key=draw(st.booleans()),
                         sizes=draw(st.sampled_from([(1, 1), (4, 1), (8, 3), (2, 16)])),
                         decay=draw(st.sampled_from([0.0, 0.01, 1.0, 50.0])), seed=draw(st.integers(0, 999)))
    return feeds, {"rule": RULES.index(rule), "scale": draw(st.sampled_from([0.1, 0.3536, 1.0]))}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(linear_calls())
def test_linear_attention_equals_the_fp64_reference_on_any_call(call):
    feeds, attributes = call
    model = state_functions.inline(op_model(LINEAR_ATTENTION, feeds, attributes))
    assert_same(LINEAR_ATTENTION, run(model, feeds), feeds, attributes)


@st.composite
def conv_calls(draw):
    steps = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(0, steps), min_size=1, max_size=4))
    feeds = conv_feeds(lengths, steps=steps, channels=draw(st.integers(1, 6)), kernel=draw(st.integers(2, 9)),
                       bias=draw(st.booleans()), seed=draw(st.integers(0, 999)))
    return feeds, {"activation": draw(st.integers(0, 1))}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(conv_calls())
def test_convolution_equals_the_fp64_reference_on_any_call(call):
    feeds, attributes = call
    assert_same(CAUSAL_CONV, run(state_functions.inline(op_model(CAUSAL_CONV, feeds, attributes)), feeds), feeds,
                attributes)


def test_inlining_leaves_standard_ops_only_with_names_of_their_own():
    op, feeds, attributes = CASES[3]
    model = op_model(op, feeds, attributes)
    second = onnx.NodeProto()
    second.CopyFrom(model.graph.node[0])
    second.name, second.output[0], second.output[1] = "layers.1/call", "output_1", "new_state_1"
    model.graph.node.append(second)
    flat = state_functions.inline(model)
    assert not [node.name for node in flat.graph.node if node.domain]
    assert len({node.name for node in flat.graph.node}) == len(flat.graph.node)
    assert [entry.domain for entry in flat.opset_import] == [""]
    assert not flat.functions
    onnx.checker.check_model(flat, full_check=True)


def test_a_model_without_state_ops_is_left_alone():
    model = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    assert state_functions.inline(model) is model


@pytest.mark.parametrize("change", ["input", "attribute", "unknown"])
def test_a_call_that_is_not_of_the_contract_is_refused(change):
    op, feeds, attributes = CASES[0]
    model = op_model(op, feeds, attributes)
    node = model.graph.node[0]
    if change == "input":
        node.input[op.input_index("beta")] = ""
    elif change == "attribute":
        del node.attribute[0]
    else:
        node.attribute.append(onnx.helper.make_attribute("chunk", 64))
    with refused("E-GRAPH-CALL", UnsupportedModel):
        state_functions.inline(model)


MUTATIONS = {
    "decay dropped": ("LinearAttention", "Exp (decay_BSHG)", "Exp (no_decay)"),
    "decay of the wrong sign": ("LinearAttention", "Exp (decay_BSHG)", "Reciprocal (factor_of)"),
    "beta of the wrong head": ("LinearAttention", "Where (real_BS1, beta, zero_f)", "Where (real_BS1, turned, zero_f)"),
    "what the state holds is not taken back": ("LinearAttention", "Sub (moved_BH1E, back_BH1E)",
                                               "Identity (moved_BH1E)"),
    "state read before it decays": ("LinearAttention", "MatMul (k_row, kept_BHDE)", "MatMul (k_row, before_BHDE)"),
    "state read before the new token": ("LinearAttention", "MatMul (q_row, after_BHDE)", "MatMul (q_row, kept_BHDE)"),
    "queries of the wrong head": ("LinearAttention", "Div (head_H, values_per_query)", "Mod (head_H, Hq)"),
    "keys of the wrong head": ("LinearAttention", "Div (head_H, values_per_key)", "Mod (head_H, Hk)"),
    "padding decays the state": ("LinearAttention", "Where (real_BS11, decay, zero_f)", "Min (decay, zero_f)"),
    "padded keys reach the state": ("LinearAttention", "Where (real_BS11, key_f, zero_f)", "Identity (key_f)"),
    "output at the padding": ("LinearAttention", "Where (real_BS11, rows_BSHE, zero_f)", "Identity (rows_BSHE)"),
    "state not written back": ("LinearAttention", "    new_state, rows_SBH1E", "    lost, rows_SBH1E"),
    "state transposed": ("LinearAttention", "    new_state, rows_SBH1E", "    turned_state, rows_SBH1E"),
    "scale dropped": ("LinearAttention", "Mul (query_f, scale_f)", "Identity (query_f)"),
    "convolution shifted by one": ("CausalConv", "Unsqueeze (place, axis_0)", "Unsqueeze (before, axis_0)"),
    "convolution's state shifted by one": ("CausalConv", "Add (new_B1, kept_J)", "Max (shifted_state, zero)"),
    "convolution's state from the padded end": ("CausalConv", "Add (new_B1, kept_J)", "Add (end_B1, kept_J)"),
    "convolution's state not written back": ("CausalConv", "GatherND <batch_dims: int = 2> (inputs_BCL, last_BCJ1)",
                                             "Identity (state)"),
    "kernel turned around": ("CausalConv", "Transpose <perm: ints = [1, 0]> (weight_f)",
                             "Transpose <perm: ints = [1, 0]> (turned)"),
    "bias dropped": ("CausalConv", "Add (sums_BCS, bias_C1)", "Identity (sums_BCS)"),
    "SiLU dropped": ("CausalConv", "Where (is_silu, silu_BCS, biased_BCS)", "Identity (biased_BCS)"),
    "convolution's output at the padding": ("CausalConv", "Where (real_B1S, active_BCS, zero_f)",
                                            "Identity (active_BCS)"),
}
BESIDE = {
    "decay dropped": "    no_decay = Sub (decay_BSHG, decay_BSHG)\n",
    "convolution's state from the padded end": "    end_B1 = Max (new_B1, S)\n",
    "decay of the wrong sign": "    factor_of = Exp (decay_BSHG)\n",
    "beta of the wrong head": ("    heads_back = Constant <value_ints: ints = [3, 0, 1, 2]> ()\n"
                               "    turned = Gather <axis: int = 2> (beta, heads_back)\n"),
    "convolution shifted by one": "    earlier = Sub (place, one)\n    before = Max (earlier, zero)\n",
    "convolution's state shifted by one": "    later = Add (new_B1, kept_J)\n    shifted_state = Sub (later, one)\n",
    "kernel turned around": ("    back = Constant <value_ints: ints = [3, 2, 1, 0]> ()\n"
                             "    turned = Gather <axis: int = 1> (weight_f, back)\n"),
}
"""lines before the changed one"""
AFTER = {
    "state not written back": "    new_state = Identity (state)\n",
    "state transposed": ("    E_D = Shape <start: int = 2> (state)\n"
                         "    whole = Concat <axis: int = 0> (keep, keep, E_D)\n"
                         "    flipped = Transpose <perm: ints = [0, 1, 3, 2]> (turned_state)\n"
                         "    new_state = Reshape (flipped, whole)\n"),
}
"""lines at the end"""


def mutated(name, monkeypatch):
    """Put a mutated body in the place of the sound one."""
    op, old, new = MUTATIONS[name]
    text = state_functions._BODIES[op]
    assert text.count(old) == 1, f"{text.count(old)} places fit"
    start = text.rfind("\n", 0, text.index(old)) + 1
    text = text[:start] + BESIDE.get(name, "") + text[start:].replace(old, new) + AFTER.get(name, "")
    if "(keep," in text:
        text = "    keep = Constant <value_ints: ints = [0]> ()\n" + text
    monkeypatch.setitem(state_functions._BODIES, op, text)
    return op


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_body_is_caught(name, monkeypatch):
    changed = mutated(name, monkeypatch)
    caught = 0
    for op, feeds, attributes in CASES:
        if op.name == changed:
            try:
                actual = run(state_functions.inline(op_model(op, feeds, attributes)), feeds)
            except Exception as error:  # a mutation may not fit the shapes of a case
                assert "onnxruntime" in type(error).__module__, error  # noqa: PT017 the run, not this test
                continue
            try:
                assert_same(op, actual, feeds, attributes)
            except AssertionError:
                caught += 1
    assert caught, f"{name}: no case of the op tells it from the sound body"
