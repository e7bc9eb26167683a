"""Target `onnx`: standard operators only; attention against the op's fp64 truth, whole models against transformers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from gqa_export import attention_op, graph_io
from gqa_export.lowering.attention_function import is_call
from gqa_export.lowering.onnx import fusions
from gqa_export.runtime.feeds import attention_mask

from .attention_only import TOKENS, AttentionOnly
from .one_op import Attributes, assert_same, session
from .test_portable import assert_decodes
from .whole_model import Decoder, canonical, eager, lowered, with_weights

FP32_ATOL = 2e-6
"""as for the function body: a mean of values below 5, about 16 roundings of 2^-24 * 5 at worst"""
GARBAGE = 1e4
"""what lies beyond the lengths must be finite for this target, but may be as large as this"""


def ops(model: onnx.ModelProto) -> Counter:
    return Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node)


@pytest.mark.parametrize(("name", "mode"), [
    ("gemma2", "static"), ("qwen3", "growing"), ("stablelm", "growing")])
def test_ragged_chunked_decoding_equals_transformers(name, mode):
    module, (_, spec) = eager(name), canonical(name, mode)
    decoder = Decoder(with_weights(lowered(name, "onnx", mode).model, module), spec, mode, batch=3)
    for cache in decoder.past.values():
        cache[:] = GARBAGE
    assert_decodes(decoder, module, spec)


@st.composite
def conversations(draw):
    """A model and some ragged steps that fit its capacity, though their padding may not."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 3), (3, 1)]))
    capacity = draw(st.integers(4, 14))
    model = AttentionOnly(
        Attributes(kv_heads * group, kv_heads, draw(st.sampled_from([0.1, 0.5])),
                   window=draw(st.sampled_from([0, 1, 2, 5])), growing=draw(st.integers(0, 1))),
        "onnx", value_head=draw(st.sampled_from([4, 8])), capacity=capacity)
    batch = draw(st.integers(1, 3))
    lengths, steps = np.zeros(batch, int), []
    for _ in range(draw(st.integers(1, 4))):
        width = draw(st.integers(1, capacity + 2))
        new = np.array([draw(st.integers(0, min(width, capacity - int(length)))) for length in lengths])
        lengths = lengths + new
        steps.append((width, new))
    return model, steps


@settings(max_examples=40, deadline=None, derandomize=True)
@given(conversations())
def test_any_conversation_within_capacity_equals_the_fp64_reference(conversation):
    model, steps = conversation
    random = np.random.default_rng(3)
    past = np.zeros(len(steps[0][1]), int)
    cache = model.empty_cache(len(past), GARBAGE)
    for width, new in steps:
        ids = random.integers(0, TOKENS, (len(past), width))
        outputs, (expected, feeds) = model.run(cache, past, ids, new), model.expected(cache, past, ids, new)
        assert_same(outputs, expected, feeds, atol=FP32_ATOL)
        past, cache = past + new, outputs[1:]


@pytest.mark.parametrize("window", [4, 5, 6])
@pytest.mark.parametrize("growing", [0, 1])
def test_window_counts_the_current_token(window, growing):
    model = AttentionOnly(Attributes(window=window, growing=growing), "onnx", capacity=9)
    cache, past = model.empty_cache(1, GARBAGE), np.array([0])
    for count in (5, 1, 1):
        ids, new = np.arange(count)[None] + past, np.array([count])
        outputs, (expected, feeds) = model.run(cache, past, ids, new), model.expected(cache, past, ids, new)
        assert_same(outputs, expected, feeds, atol=FP32_ATOL)
        past, cache = past + new, outputs[1:]


def test_padding_beyond_the_capacity_harms_no_token():
    """past 6 + width 4 > capacity 8 >= 6 + 2: a plain TensorScatter at 6 would be out of bounds."""
    model = AttentionOnly(Attributes(growing=0), "onnx", capacity=8)
    random = np.random.default_rng(0)
    cache, past, new = [random.standard_normal(x.shape).astype(np.float32) for x in model.empty_cache(2, 1)], \
        np.array([6, 1]), np.array([2, 4])
    ids = random.integers(0, TOKENS, (2, 4))
    outputs, (expected, feeds) = model.run(cache, past, ids, new), model.expected(cache, past, ids, new)
    assert_same(outputs, expected, feeds, atol=FP32_ATOL)
    for before, after in zip(cache, outputs[1:]):
        np.testing.assert_array_equal(after[1, :, 5:], before[1, :, 5:], err_msg="padding was written")


def test_past_the_capacity_only_that_sequence_is_nan():
    model = AttentionOnly(Attributes(growing=0), "onnx", capacity=6)
    cache, past, new = model.empty_cache(2, 1), np.array([5, 1]), np.array([2, 2])
    output = model.run(cache, past, np.array([[1, 2, 3], [4, 5, 6]]), new)[0]
    assert np.isnan(output[0, :2]).all()
    np.testing.assert_array_equal(output[0, 2], 0)
    assert not np.isnan(output[1]).any()


def test_past_and_present_may_be_the_same_memory():
    model = AttentionOnly(Attributes(growing=0, window=5), "onnx", capacity=12)
    random, past = np.random.default_rng(0), np.zeros(2, int)
    cache = model.empty_cache(2, GARBAGE)
    shared = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in cache]
    for width, new in ((7, [7, 3]), (1, [1, 1]), (6, [4, 2]), (1, [0, 1]), (5, [0, 5])):
        ids, new = random.integers(0, TOKENS, (2, width)), np.array(new)
        expected, feeds = model.expected([value.numpy().copy() for value in shared], past, ids, new)
        binding = model.session.io_binding()
        binding.bind_output(graph_io.LOGITS)
        binding.bind_cpu_input(graph_io.INPUT_IDS, ids)
        binding.bind_cpu_input(graph_io.ATTENTION_MASK, attention_mask(past, new, 12, width))
        for before, after, value in zip(graph_io.past_names(0), graph_io.present_names(0), shared):
            binding.bind_ortvalue_input(before, value)
            binding.bind_ortvalue_output(after, value)
        model.session.run_with_iobinding(binding)
        outputs = [binding.copy_outputs_to_cpu()[0], *[value.numpy() for value in shared]]
        assert_same(outputs, expected, feeds, atol=FP32_ATOL)
        past = past + new


def test_fp16_asks_for_an_fp32_softmax_and_stays_close():
    model = AttentionOnly(Attributes(), "onnx", dtype=np.float16)
    attention = next(node for node in model.lowered.model.graph.node if node.op_type == "Attention")
    assert {a.name: a.i for a in attention.attribute}["softmax_precision"] == TensorProto.FLOAT
    cache, past, new, ids = model.empty_cache(1, 0), np.array([0]), np.array([6]), np.arange(6)[None]
    expected, _ = model.expected(cache, past, ids, new)
    # q, k, the scores and the weights are rounded to fp16 on the way: a few units of 2^-11 of values up to 3
    np.testing.assert_allclose(model.run(cache, past, ids, new)[0], expected[0], atol=6 * 2.0 ** -11)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_scores_of_an_unused_cache_in_fp16_are_masked_however_large_they_are(scale):
    """Keys of 1e4 give scores of 2e4 * scale and more, some beyond what fp16 holds: where a mask is boolean, ONNX
    Runtime masks by adding fp16's lowest number to them, -65504."""
    model = AttentionOnly(Attributes(scale=scale, growing=0, window=5), "onnx", capacity=12, dtype=np.float16)
    past, random = np.zeros(2, int), np.random.default_rng(0)
    cache = model.empty_cache(2, GARBAGE)
    for width, new in ((7, [7, 3]), (1, [1, 1]), (3, [1, 3])):
        ids, new = random.integers(0, TOKENS, (2, width)), np.array(new)
        outputs, (expected, feeds) = model.run(cache, past, ids, new), model.expected(cache, past, ids, new)
        assert np.abs(feeds["query"]).max() > 1, "the scores of the garbage must be large"
        # as above, and scores of up to 20 * scale are rounded by up to 2^-7 * scale, which weighs values of up to 3
        np.testing.assert_allclose(outputs[0], expected[0], atol=6 * 2.0 ** -11 + 3 * 2.0 ** -7 * scale)
        past, cache = past + new, outputs[1:]


@pytest.mark.parametrize(("softcap", "sinks", "reason"), [(20.0, False, "cap scores"), (0.0, True, "sinks")])
def test_what_attention_cannot_hold_falls_back_to_the_function(softcap, sinks, reason):
    model = AttentionOnly(Attributes(softcap=softcap), "onnx", sinks=sinks)
    (fallback,) = model.lowered.fallbacks
    op = f"{attention_op.DOMAIN}::{attention_op.OP}"
    assert (fallback.layer, fallback.wanted, fallback.used) == (0, "Attention", op)
    assert reason in fallback.reason
    assert [function.name for function in model.lowered.model.functions] == [attention_op.OP]
    cache, past, new, ids = model.empty_cache(2, 0), np.array([0, 0]), np.array([4, 2]), np.arange(8).reshape(2, 4)
    outputs, (expected, feeds) = model.run(cache, past, ids, new), model.expected(cache, past, ids, new)
    assert_same(outputs, expected, feeds, atol=FP32_ATOL)


@pytest.mark.parametrize("mode", ["growing", "static"])
def test_llama_is_standard_operators_only(mode):
    result = lowered("llama", "onnx", mode)
    layers = len(canonical("llama", mode)[1].layers)
    counts = ops(result.model)
    assert not result.fallbacks
    assert not any(is_call(node) for node in result.model.graph.node)
    assert not result.model.functions
    assert {entry.domain: entry.version for entry in result.model.opset_import} == {
        "": 23 if mode == "growing" else 24}
    assert counts["Attention"] == layers
    assert counts["RotaryEmbedding"] == 2 * layers
    assert counts["RMSNormalization"] == 2 * layers + 1
    assert counts["TensorScatter"] == (2 * layers if mode == "static" else 0)
    assert counts["Neg"] == 1, "rotate_half left something behind"


def test_checker_accepts_a_static_model_in_full():
    onnx.checker.check_model(with_weights(lowered("llama", "onnx", "static").model, eager("llama")), full_check=True)


def test_masks_and_indices_are_computed_once_a_window():
    model = lowered("llama", "onnx", "static").model
    masks = {node.input[3] for node in model.graph.node if node.op_type == "Attention"}
    assert masks == {"lengths/mask_0.0"}
    assert ops(model)["Expand"] <= 2


def rms_norm_model(epsilon: float, axis: int, exponent: float, weight_shape: tuple[int, ...]) -> onnx.ModelProto:
    nodes = [helper.make_node(op, inputs, [output], name=output, **attrs) for op, inputs, output, attrs in (
        ("Pow", ["x", "two"], "square", {}), ("ReduceMean", ["square", "axes"], "mean", {"keepdims": 1}),
        ("Add", ["mean", "epsilon"], "shifted", {}), ("Sqrt", ["shifted"], "root", {}),
        ("Reciprocal", ["root"], "factor", {}), ("Mul", ["x", "factor"], "normalised", {}),
        ("Mul", ["weight", "normalised"], "y", {}))]
    values = {"two": np.float32(exponent), "axes": np.array([axis]), "epsilon": np.float32(epsilon),
              "weight": np.random.default_rng(0).standard_normal(weight_shape).astype(np.float32)}
    graph = helper.make_graph(
        nodes, "norm", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.mark.parametrize(("axis", "exponent", "weight_shape", "fuses"), [
    (-1, 2.0, (8,), 1), (1, 2.0, (8,), 0), (-1, 3.0, (8,), 0), (-1, 2.0, (3, 8), 0)])
def test_only_a_true_rms_norm_is_fused_and_computes_the_same(axis, exponent, weight_shape, fuses):
    from gqa_export.graph import edit

    model = rms_norm_model(0.1, axis, exponent, weight_shape)
    graph = edit.load(model)
    done = fusions.fuse_rms_norm(graph, None)
    assert (done.count, len(done.near_misses)) == (fuses, 1 - fuses)
    fused = edit.save(graph)
    assert ops(fused)["RMSNormalization"] == fuses
    x = {"x": np.abs(np.random.default_rng(1).standard_normal((2, 3, 8))).astype(np.float32)}
    # a norm of 8 numbers up to 3: a handful of roundings
    np.testing.assert_allclose(session(fused).run(None, x)[0], session(model).run(None, x)[0], atol=2e-6)


@pytest.mark.parametrize(("name", "norms", "rotations"), [
    ("qwen3", 4 * 3 + 1, 6), ("phi3", 2 * 3 + 1, 6), ("gemma2", 4 * 4 + 1, 8), ("stablelm", 0, 6)])
def test_norms_and_rotations_are_fused_wherever_the_pattern_is(name, norms, rotations):
    """QK-norm; packed projections; norms by 1 + weight; LayerNorm and partial rotary."""
    counts = lowered(name, "onnx").counts
    assert (counts["fuse_rms_norm"], counts["fuse_rotary"]) == (norms, rotations)
