"""The loop in which graphs of different exporters are timed against each other."""

from __future__ import annotations

import pytest
from evidence.raw_decode_loop import RawDecoder, interleave
from refusal import refused

from gqa_export.runtime.generate import generate
from gqa_export.runtime.ort.session import OrtSession


def test_interleaved_graphs_give_the_tokens_of_the_session_and_a_time_per_step(bundle) -> None:
    folder, prompt = bundle("ort", "static"), [5, 6, 7]
    one, two = interleave({"one": (folder / "model.onnx", 16), "two": (bundle() / "model.onnx", 16)}, prompt, 12)
    expected = generate(OrtSession.load(folder, "cpu"), [prompt], 13).tokens[0]
    assert list(one.tokens) == list(two.tokens) == expected
    assert len(one.steps_ms) == 12
    assert one.tokens_per_s == pytest.approx(1000 / one.median_ms)
    assert one.nodes > 10


def test_a_step_past_the_buffer_is_refused(bundle) -> None:
    decoder = RawDecoder(bundle() / "model.onnx", 4, 16)
    decoder.step([1, 2, 3])
    with refused("E-RUN-CAPACITY"):
        decoder.step([4, 5])


def test_a_graph_with_other_inputs_is_refused(tmp_path) -> None:
    from onnx import TensorProto, helper, save

    port = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 2])
    graph = helper.make_graph([helper.make_node("Identity", ["pixels"], ["out"])], "g", [port],
                              [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 2])])
    save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "m.onnx")
    with refused("E-RUN-INPUTS") as refusal:
        RawDecoder(tmp_path / "m.onnx", 4, 16)
    assert "pixels" in refusal.error.what
