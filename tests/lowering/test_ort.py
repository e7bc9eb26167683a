"""Target `ort` beside transformers: what its graphs look like, and that they are true in what `validate` does not do.

Every tiny model is proved by `validate` (tests/export). Here is a second oracle, each row alone in fp64, for the models
that have the most: so that a fault of the first cannot hide one of the graph.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from gqa_export import attention_op, graph_io
from gqa_export.spec import Fallback

from .whole_model import CAPACITY, Decoder, canonical, eager, lowered, truth, with_weights

pytestmark = pytest.mark.whole_model

NAMES = ["llama", "llama_tied", "llama_mha", "llama_mqa", "llama_llama3", "llama_yarn", "llama_linear", "mistral",
         "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_oss", "granite", "cohere", "stablelm", "mixtral", "smollm3",
         "gpt2"]
TRUE = ["gemma3", "gpt_oss", "cohere"]
"""windows, two tables and norms of queries; sinks, biases and experts; interleaved rotary and a scaled output"""
STATIC = ["qwen2", "gemma3", "phi3", "gpt_oss"]
"""static and growing differ in shapes only: biases, windows, packed before, sinks; projections as they are stored"""
TOLERANCE = 1e-4
"""on logits of magnitude 1 to 20: fp32 against fp64 differs by 1e-6 to 2e-5 here, a wrong position or mask by 0.1"""
PARTIAL = (("hidden_size", 128), ("num_attention_heads", 2), ("num_key_value_heads", 2))
WIDE = (("head_dim", 12),)


def tokens(*lengths: int) -> list[list[int]]:
    """Fresh rows of token ids."""
    random = np.random.default_rng(sum(lengths))
    return [random.integers(3, 300, length).tolist() for length in lengths]


def decoder(name: str, mode: str = "growing", batch: int = 1, packed: bool = True, overrides=(), dtype="float32",
            logits="all") -> Decoder:
    found = lowered(name, "ort", mode, packed, overrides, dtype, logits)
    _, spec = canonical(name, mode, overrides, dtype, logits)
    return Decoder(with_weights(found.model, eager(name, overrides)), spec, mode, batch)


def assert_cache(run: Decoder, name: str, rows: list[list[int]], overrides=()) -> None:
    """Every layer's whole cache, up to each row's length, is what transformers has."""
    for b, row in enumerate(rows):
        _, layers = truth(eager(name, overrides), row)
        for layer, (key, value) in zip(run.spec.layers, layers):
            for cached, wanted in zip(graph_io.past_names(layer.layer), (key, value)):
                np.testing.assert_allclose(run.past[cached][b, :, :len(row)], wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", TRUE)
def test_prefill_then_decode_over_a_window_equals_transformers(name: str) -> None:
    rows = tokens(40)
    run, wanted = decoder(name), truth(eager(name), rows[0])[0]
    got = [run.step([rows[0][:15]])[0]]
    got += [run.step([[token]])[0] for token in rows[0][15:19]]
    got.append(run.step([rows[0][19:30]])[0])
    got += [run.step([[token]])[0] for token in rows[0][30:]]
    np.testing.assert_allclose(np.concatenate(got), wanted, atol=TOLERANCE, rtol=0)
    assert_cache(run, name, rows)


FORMS = [(name, "growing", True) for name in TRUE] + [(name, "static", False) for name in STATIC]


@pytest.mark.parametrize(("name", "mode", "packed"), FORMS)
def test_ragged_batch_equals_each_row_alone(name: str, mode: str, packed: bool) -> None:
    rows = tokens(22, 13)
    run = decoder(name, mode, 2, packed)
    wanted = [truth(eager(name), row)[0] for row in rows]
    first = run.step([rows[0][:16], rows[1][:7]])
    np.testing.assert_allclose(first[0], wanted[0][:16], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(first[1, :7], wanted[1][:7], atol=TOLERANCE, rtol=0)
    for step in range(6):
        logits = run.step([[rows[0][16 + step]], [rows[1][7 + step]]])
        for b, start in enumerate((16, 7)):
            np.testing.assert_allclose(logits[b, 0], wanted[b][start + step], atol=TOLERANCE, rtol=0)
    assert_cache(run, name, rows)


@pytest.mark.parametrize("length", [15, 16, 17])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss"])
def test_prompts_around_the_window_equal_transformers(name: str, length: int) -> None:
    assert {layer.window for layer in canonical(name)[1].layers} & {8, 16}
    row = tokens(length + 1)[0]
    run, wanted = decoder(name), truth(eager(name), row)[0]
    np.testing.assert_allclose(run.step([row[:-1]])[0], wanted[:-1], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(run.step([row[-1:]])[0], wanted[-1:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "size", "overrides"), [("stablelm", 32, PARTIAL), ("cohere", 16, ()),
                                                         ("qwen3", 32, ()), ("gemma3", 32, ()), ("gpt_oss", 16, ())])
def test_partial_interleaved_and_normed_rotary_goes_inside(name: str, size: int, overrides) -> None:
    found = lowered(name, "ort", overrides=overrides)
    layers = len(canonical(name, overrides=overrides)[1].layers)
    assert found.counts["rotary_inside"] == layers
    assert not found.remarks
    nodes = [node for node in found.model.graph.node if node.op_type == "GroupQueryAttention"]
    attributes = [{a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT} for node in nodes]
    assert all(each["do_rotary"] for each in attributes)
    assert {each["rotary_interleaved"] for each in attributes} == {int(name == "cohere")}
    tables = {t.name: tuple(t.dims) for t in found.model.graph.initializer if t.name.startswith("rotary/")}
    assert set(tables.values()) == {(CAPACITY, size // 2)}
    row = tokens(21)[0]
    run = decoder(name, overrides=overrides)
    got = np.concatenate([run.step([row[:17]])[0], *[run.step([[token]])[0] for token in row[17:]]])
    np.testing.assert_allclose(got, truth(eager(name, overrides), row)[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["gemma2", "stablelm"])
def test_a_head_the_op_cannot_rotate_is_rotated_outside_and_said_so(name: str) -> None:
    found = lowered(name, "ort")
    layers = len(canonical(name)[1].layers)
    misses = [miss for miss in found.near_misses if miss.step == "rotary_inside"]
    assert found.counts["rotary_outside"] == layers == len(misses)
    assert found.remarks == (f"layers 0-{layers - 1}: {misses[0].reason}",)
    assert misses[0].reason.startswith("rotary stays outside attention")
    assert not found.fallbacks


def test_a_layer_without_rotary_gets_none() -> None:
    found = lowered("smollm3", "ort")
    rotates = [{a.name: a.i for a in node.attribute}["do_rotary"] for node in found.model.graph.node
               if node.op_type == "GroupQueryAttention"]
    assert rotates.count(0) == 1
    assert not found.remarks


@pytest.mark.parametrize("mode", ["growing", "static"])
def test_a_head_size_the_op_refuses_falls_back_to_the_function(mode: str) -> None:
    found = lowered("llama", "ort", mode, overrides=WIDE)
    reason = "com.microsoft::GroupQueryAttention takes head sizes divisible by 8, not 12"
    assert found.fallbacks[0] == Fallback(0, "com.microsoft::GroupQueryAttention", "gqa::GroupedQueryAttention", reason)
    assert len(found.fallbacks) == 3
    assert [function.name for function in found.model.functions] == [attention_op.OP]
    rows = tokens(20, 11)
    run, wanted = decoder("llama", mode, 2, overrides=WIDE), [truth(eager("llama", WIDE), row)[0] for row in rows]
    first = run.step([rows[0][:15], rows[1][:6]])
    np.testing.assert_allclose(first[1, :6], wanted[1][:6], atol=TOLERANCE, rtol=0)
    second = run.step([rows[0][15:], rows[1][6:]])
    for b, start in enumerate((15, 6)):
        np.testing.assert_allclose(second[b], wanted[b][start:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("gpt2",)])
def test_no_function_is_left_where_every_layer_is_held(name: str) -> None:
    found = lowered(name, "ort")
    assert not found.model.functions
    assert not found.fallbacks
    assert {opset.domain for opset in found.model.opset_import} == {"", "com.microsoft"}
    assert found.counts["lower_attention"] == len(canonical(name)[1].layers)


@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1], [1, 1, 0, 1, 1], [0, 1, 0, 0, 0]])
def test_left_padding_gives_nan_for_that_row_and_leaves_the_other_alone(mask: list[int]) -> None:
    rows = tokens(5, 5)
    run = decoder("llama", batch=2)
    logits = run.step(rows, np.array([[1] * 5, mask]))
    assert np.isnan(logits[1]).all()
    np.testing.assert_allclose(logits[0], truth(eager("llama"), rows[0])[0], atol=TOLERANCE, rtol=0)


WHOLE_ROWS = [("llama", (), "all"), ("llama", (), "last"), ("llama", WIDE, "all"), ("llama", WIDE, "last"),
              ("stablelm", (), "all"), ("gpt2", (), "all"), ("gemma2", (), "last"), ("mistral", (), "all")]
"""everything inside the op, layers that fell back, rotary outside, positions looked up, a window"""


@pytest.mark.parametrize("mode", ["growing", "static"])
@pytest.mark.parametrize(("name", "overrides", "logits"), WHOLE_ROWS)
def test_a_mask_with_all_ones_of_a_row_first_is_right_too(name: str, overrides, logits: str, mode: str) -> None:
    """As onnxruntime-genai's Engine pads a batch, and `arange(total) < length`."""
    rows = tokens(30, 21, 13, 8)
    run = decoder(name, mode, 4, overrides=overrides, logits=logits)
    wanted = [truth(eager(name, overrides), row)[0] for row in rows]
    run.step([row[:-6] for row in rows])
    for step in range(6):
        ends = [len(row) - 6 + step for row in rows]
        past = next(iter(run.past.values())).shape[2] if mode == "growing" else int(run.lengths.max()) + step % 2
        mask = (np.arange(past + 1) < np.array(ends)[:, None] + 1).astype(np.int64)
        got = run.step([[row[end]] for row, end in zip(rows, ends)], mask)
        for b, end in enumerate(ends):
            np.testing.assert_allclose(got[b, 0], wanted[b][end], atol=TOLERANCE, rtol=0)
    assert_cache(run, name, rows, overrides)


@pytest.mark.parametrize("name", ["llama", "stablelm"])
@pytest.mark.parametrize("mask", [[0, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 0], [1, 0, 1, 0, 0, 0]])
def test_a_hole_in_the_mask_of_a_decode_step_gives_nan_for_that_row(name: str, mask: list[int]) -> None:
    rows = tokens(6, 6)
    run = decoder(name, batch=2)
    run.step([row[:5] for row in rows])
    logits = run.step([row[5:] for row in rows], np.array([[1] * 6, mask]))
    assert np.isnan(logits[1]).all()
    np.testing.assert_allclose(logits[0, 0], truth(eager(name), rows[0])[0][5], atol=TOLERANCE, rtol=0)


def test_several_tokens_under_a_mask_wider_than_the_cache_s_tokens_are_counted_from_its_end() -> None:
    """A static mask: as wide as the buffer from the first step on."""
    row = tokens(9)[0]
    for name in ("llama", "stablelm", "gpt2"):
        run, wanted = decoder(name, "static"), truth(eager(name), row)[0]
        for start, end in ((0, 5), (5, 8), (8, 9)):
            mask = (np.arange(CAPACITY)[None] < end).astype(np.int64)
            np.testing.assert_allclose(run.step([row[start:end]], mask)[0], wanted[start:end], atol=TOLERANCE, rtol=0)


def test_logits_of_the_last_token_are_those_of_each_row() -> None:
    rows = tokens(9, 4)
    run = decoder("llama", batch=2, logits="last")
    got = run.step(rows)
    assert got.shape == (2, 1, 320)
    for b, row in enumerate(rows):
        np.testing.assert_allclose(got[b, 0], truth(eager("llama"), row)[0][-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_fp16_graph_runs_and_stays_within_fp16(name: str) -> None:
    row = tokens(18)[0]
    run, wanted = decoder(name, dtype="float16"), truth(eager(name), row)[0]
    got = np.concatenate([run.step([row[:12]])[0], *[run.step([[token]])[0] for token in row[12:]]])
    assert got.dtype == np.float16
    # 2^-11 a rounding, some hundred of them along the residual, on logits up to 20; measured 0.01 to 0.05
    np.testing.assert_allclose(got.astype(np.float64), wanted, atol=0.15, rtol=0)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_bf16_graph_is_well_typed_and_right_with_fp16_in_its_place(name: str) -> None:
    """ONNX Runtime's CPU provider has no bf16: the same graph with the other 16-bit type shows types and values."""
    model = onnx.ModelProto()
    model.CopyFrom(lowered(name, "ort", dtype="bfloat16").model)
    low, other = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        if tensor.data_type == low and tensor.data_location != onnx.TensorProto.EXTERNAL:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        elif tensor.data_type == low:
            tensor.data_type = other
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == low:
            value.type.tensor_type.elem_type = other
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == low:
                attribute.i = other
    row = tokens(9)[0]
    run = Decoder(with_weights(model, eager(name)), canonical(name)[1], "growing", 1)
    # bf16 tables of cos and sin, 2^-9, besides the roundings of fp16
    np.testing.assert_allclose(run.step([row])[0].astype(np.float64), truth(eager(name), row)[0], atol=0.3, rtol=0)


def test_tied_weights_are_one_initializer_for_embedding_and_head() -> None:
    found = lowered("llama_tied", "ort")
    gather = next(node for node in found.model.graph.node if node.op_type == "Gather")
    head = next(node for node in found.model.graph.node if graph_io.LOGITS in node.output)
    assert gather.input[0] == head.input[1]
    assert head.op_type == "FusedMatMul"


def test_packed_projections_join_rows_and_as_stored_ones_join_nothing() -> None:
    def recipes(packed: bool) -> list[str]:
        tensors = lowered("qwen2", "ort", packed=packed).model.graph.initializer
        locations = [entry.value for tensor in tensors for entry in tensor.external_data]
        return [location for location in locations if "layers.0.self_attn" in location]

    stem = "model.layers.0.self_attn"
    joined = [f"weights:{stem}.q_proj.{kind}+{stem}.k_proj.{kind}+{stem}.v_proj.{kind}" for kind in ("weight", "bias")]
    assert set(joined) < set(recipes(True))
    assert not [recipe for recipe in recipes(False) if "+" in recipe]


@pytest.mark.parametrize(("packed", "most"), [(True, 345), (False, 400)])
def test_thirty_tied_layers_take_fewer_nodes_than_the_budget(packed: bool, most: int) -> None:
    found = lowered("llama_tied", "ort", packed=packed, overrides=(("num_hidden_layers", 30),))
    assert len(found.model.graph.node) <= most
    assert found.counts["rotary_inside"] == 30
    assert found.counts["fuse_norms"] == 61
    assert found.counts["fuse_skip_norms"] == 60
    assert not found.model.functions
    assert sum(len(tensor.raw_data) for tensor in found.model.graph.initializer) < 100_000, "no weight is inside"
