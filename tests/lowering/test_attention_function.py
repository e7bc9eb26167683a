"""The function body of the op against its fp64 truth, through ONNX Runtime, and against the contract."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from refusal import refused

from gqa_export import attention_op
from gqa_export.errors import UnsupportedModel
from gqa_export.lowering import attention_function

from .one_op import Attributes, assert_same, fresh_inputs, op_model, session, truth

FP32_ATOL = 2e-6
"""A row is a mean of values below 5 with scores of some 30 terms: about 16 roundings of 2^-24 * 5 at worst."""
FP16_RTOL = 2.0 ** -10
"""The body computes in fp32 and rounds once, by half a unit in the last place of fp16 (2^-11); doubled."""


def run(attributes: Attributes, feeds: dict[str, np.ndarray], dtype: int = TensorProto.FLOAT) -> list[np.ndarray]:
    model = op_model(attributes, dtype)
    attention_function.attach_function(model)
    return session(model).run(None, feeds)


def check(attributes: Attributes, feeds: dict[str, np.ndarray]) -> None:
    assert_same(run(attributes, feeds), truth(attributes, feeds), feeds, atol=FP32_ATOL)


@st.composite
def calls(draw):
    """Any call within capacity: attributes, and inputs poisoned with NaN wherever no valid token is."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 3), (3, 2)]))
    attributes = Attributes(
        num_heads=kv_heads * group, kv_num_heads=kv_heads, scale=draw(st.sampled_from([0.1, 0.3536, 1.0])),
        softcap=draw(st.sampled_from([0.0, 1.5, 30.0])),
        window=draw(st.sampled_from([0, 1, 2, 3, 5, 100, -1, -2, -3, -5, -100])),
        growing=draw(st.integers(0, 1)))
    steps, axis = draw(st.integers(1, 6)), draw(st.integers(0, 9))
    if not attributes.growing:
        axis = max(axis, 1)
    past, new = [], []
    for _ in range(draw(st.integers(1, 4))):
        past.append(draw(st.integers(0, axis)))
        new.append(draw(st.integers(0, steps if attributes.growing else min(steps, axis - past[-1]))))
    feeds = fresh_inputs(attributes, past, new, axis=axis, steps=steps, head=draw(st.sampled_from([4, 8])),
                         value_head=draw(st.sampled_from([4, 6])), seed=draw(st.integers(0, 999)),
                         sinks=draw(st.booleans()))
    return attributes, feeds


@settings(max_examples=60, deadline=None, derandomize=True)
@given(calls())
def test_body_equals_the_fp64_reference_on_any_call(call):
    check(*call)


@pytest.mark.parametrize("window", [4, 5, 6, 7])
def test_window_counts_the_current_token_at_lengths_around_it(window):
    attributes = Attributes(window=window)
    for length in (4, 5, 6):  # W - 1, W and W + 1 of the middle cases, as prefill and as the last decode step
        check(attributes, fresh_inputs(attributes, [0], [length], axis=0, steps=length, seed=window))
        check(attributes, fresh_inputs(attributes, [length - 1], [1], axis=length - 1, steps=1, seed=window))


@pytest.mark.parametrize("growing", [0, 1])
def test_chunks_end_where_they_should_in_a_prompt_in_pieces_of_one_and_in_single_steps(growing):
    attributes = Attributes(window=-4, growing=growing)
    for length in (3, 4, 5, 8, 9, 13):  # within the first chunk, at and past its end, and past two ends
        check(attributes, fresh_inputs(attributes, [0, 0], [length, 2], axis=0 if growing else 14, steps=length))
        check(attributes, fresh_inputs(attributes, [length, 4], [5, 1], axis=length + 5, steps=5))
        check(attributes, fresh_inputs(attributes, [length - 1, 0], [1, 1], axis=length, steps=1))


def test_only_a_model_with_attention_in_chunks_has_the_nodes_for_them():
    plain, windowed, chunked = (op_model(Attributes(window=window)) for window in (0, 5, -5))
    for model in (plain, windowed, chunked):
        attention_function.attach_function(model)
    assert plain.functions[0] == windowed.functions[0] == attention_function.function_proto(23)
    assert len(chunked.functions[0].node) == len(plain.functions[0].node) + 7


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_mha_gqa_and_mqa_are_the_same_body(heads, kv_heads):
    attributes = Attributes(num_heads=heads, kv_num_heads=kv_heads)
    check(attributes, fresh_inputs(attributes, [3, 0], [2, 4], axis=5, steps=4))


def test_static_equals_growing():
    growing, static = Attributes(softcap=5.0, window=4), Attributes(softcap=5.0, window=4, growing=0)
    feeds = fresh_inputs(growing, [6, 2, 0], [3, 1, 0], axis=6, steps=3)
    padded = {name: np.pad(x, [(0, 0), (0, 0), (0, 3), (0, 0)]) if name.startswith("past_") and x.ndim == 4 else x
              for name, x in feeds.items()}
    first, second = run(growing, feeds), run(static, padded)
    assert first[1].shape == second[1].shape
    assert_same(first, second, feeds, atol=FP32_ATOL)


def test_chunked_prefill_equals_one_prefill():
    attributes = Attributes(window=5)
    whole = fresh_inputs(attributes, [0], [9], axis=0, steps=9)
    expected = run(attributes, whole)
    first = {**whole, **{name: whole[name][:, :4] for name in ("query", "key", "value")},
             "new_lengths": np.array([4], np.int32)}
    head = run(attributes, first)
    second = {**whole, **{name: whole[name][:, 4:] for name in ("query", "key", "value")}, "past_key": head[1],
              "past_value": head[2], "past_lengths": np.array([4], np.int32), "new_lengths": np.array([5], np.int32)}
    tail = run(attributes, second)
    np.testing.assert_allclose(np.concatenate([head[0], tail[0]], 1), expected[0], atol=FP32_ATOL)
    np.testing.assert_array_equal(tail[1], expected[1])


def test_past_the_capacity_only_that_sequence_is_nan():
    attributes = Attributes(growing=0)
    feeds = fresh_inputs(attributes, [2, 6, 3], [2, 3, 1], axis=8, steps=3)
    output = run(attributes, feeds)[0]
    assert np.isnan(output[1]).all()
    np.testing.assert_allclose(output, truth(attributes, feeds)[0], atol=FP32_ATOL)
    assert not np.isnan(output[[0, 2]]).any()


@pytest.mark.parametrize(("past", "new"), [(-1, 2), (2, 5)])
def test_lengths_that_cannot_be_are_nan(past, new):
    attributes = Attributes()
    feeds = fresh_inputs(attributes, [2, 2], [1, 1], axis=4, steps=3, poison=False)
    feeds["past_lengths"][0], feeds["new_lengths"][0] = past, new
    output = run(attributes, feeds)[0]
    assert np.isnan(output[0, :min(new, 3)]).all()
    assert not np.isnan(output[1]).any()


def test_a_row_that_sees_nothing_is_zero_even_with_a_sink():
    for sinks in (False, True):
        feeds = fresh_inputs(Attributes(), [0, 3], [0, 0], axis=3, steps=2, sinks=sinks)
        np.testing.assert_array_equal(run(Attributes(), feeds)[0], 0)


def test_huge_scores_do_not_overflow():
    attributes = Attributes(scale=1e4)
    check(attributes, fresh_inputs(attributes, [1], [3], axis=1, steps=3))


@pytest.mark.parametrize("growing", [0, 1])
def test_fp16_is_rounded_once(growing):
    attributes = Attributes(window=3, softcap=10.0, growing=growing)
    feeds = fresh_inputs(attributes, [4, 1], [2, 1], axis=6, steps=2, sinks=True, dtype=np.float16)
    expected = truth(attributes, feeds)
    assert_same(run(attributes, feeds, TensorProto.FLOAT16), expected, feeds, atol=FP32_ATOL, rtol=FP16_RTOL)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
@pytest.mark.parametrize("opset", [21, 23, 24])
def test_checker_accepts_the_function_at_the_opset_of_the_model(opset, dtype):
    model = op_model(Attributes(), dtype, opset)
    attention_function.attach_function(model)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.functions[0].opset_import] == [("", opset)]


def test_onnx_reference_evaluator_agrees():
    from onnx.reference import ReferenceEvaluator

    attributes = Attributes(window=3, softcap=4.0)
    model = op_model(attributes)
    attention_function.attach_function(model)
    feeds = fresh_inputs(attributes, [2, 0], [2, 1], axis=3, steps=2, sinks=True)
    assert_same(ReferenceEvaluator(model).run(None, feeds), truth(attributes, feeds), feeds, atol=FP32_ATOL)


def test_signature_is_the_contract():
    function = attention_function.function_proto(23)
    assert (function.domain, function.name) == (attention_op.DOMAIN, attention_op.OP)
    assert tuple(function.input) == attention_op.INPUT_NAMES
    assert tuple(function.output) == attention_op.OUTPUT_NAMES
    assert tuple(function.attribute) == attention_op.ATTRIBUTE_NAMES
    assert not function.attribute_proto


def test_every_value_is_used_except_what_the_body_ignores_on_purpose():
    function = attention_function.function_proto(23)
    read = {name for node in function.node for name in node.input} | set(function.output)
    written = {name for node in function.node for name in node.output} | set(function.input)
    assert written - read == {"cos", "sin"}
    referred = {attribute.ref_attr_name for node in function.node for attribute in node.attribute} - {""}
    assert set(attention_op.ATTRIBUTE_NAMES) - referred == {"rotary_interleaved"}
    assert not [node.op_type for node in function.node if node.op_type in ("If", "Loop", "Scan")]


def test_inlined_model_has_no_function_and_computes_the_same():
    attributes = Attributes(window=4)
    flat = attention_function.inline(op_model(attributes))
    assert not flat.functions
    assert attention_op.DOMAIN not in {entry.domain for entry in flat.opset_import}
    onnx.checker.check_model(flat, full_check=True)
    feeds = fresh_inputs(attributes, [3, 1], [1, 1], axis=3, steps=1)
    for inlined, called in zip(session(flat).run(None, feeds), run(attributes, feeds)):
        np.testing.assert_array_equal(inlined, called)


def test_attaching_twice_leaves_one_function():
    model = op_model(Attributes())
    attention_function.attach_function(model)
    attention_function.attach_function(model)
    assert len(model.functions) == 1


@pytest.mark.parametrize(("spoil", "wrong"), [
    (lambda node: node.input.__setitem__(attention_op.input_index("key"), ""), "key is absent"),
    (lambda node: node.input.pop(), "sinks is absent"),
    (lambda node: node.input.__setitem__(attention_op.input_index("cos"), "query"), "cos is given"),
    (lambda node: node.attribute.pop(), "attribute growing is absent"),
    (lambda node: node.attribute.append(onnx.helper.make_attribute("bias", 1)), "attribute bias is unknown"),
])
def test_a_call_that_the_body_cannot_stand_for_is_refused(spoil, wrong):
    model = op_model(replace(Attributes(), window=2))
    node = model.graph.node[0]
    node.attribute.sort(key=lambda attribute: attention_op.ATTRIBUTE_NAMES.index(attribute.name))
    spoil(node)
    with refused("E-GRAPH-CALL", UnsupportedModel) as refusal:
        attention_function.attach_function(model)
    assert wrong in refusal.error.what
