"""What ONNX Runtime answers is written where it is handed on: no cache is in memory a third time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from polygraphy.backend.onnxrt import OnnxrtRunner

from gqa_export.validation.bound_outputs import BoundOutputs


def graph(answer: list, element: int = TensorProto.FLOAT) -> bytes:
    """past [batch, tokens] and one new column give present, which has one token more, declared as `answer`."""
    ports = [helper.make_tensor_value_info(name, element, shape) for name, shape in (
        ("past", ["batch", "tokens"]), ("new", ["batch", "sequence"]))]
    mask = helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", "total"])
    body = helper.make_graph([helper.make_node("Concat", ["past", "new"], ["present"], axis=1),
                              helper.make_node("ReduceSum", ["mask"], ["seen"], keepdims=0)], "g", [*ports, mask],
                             [helper.make_tensor_value_info("present", element, answer),
                              helper.make_tensor_value_info("seen", TensorProto.INT64, [])])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


def feed(past: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {"past": np.arange(2 * past, dtype=dtype).reshape(2, past), "new": np.full((2, 1), 7, dtype),
            "mask": np.ones((2, past + 1), np.int64)}


class Watched:
    """A session that tells what was bound, and how often it was run without."""

    def __init__(self, session) -> None:
        self.session, self.bound, self.plain = session, [], 0

    def __getattr__(self, name: str):
        return getattr(self.session, name)

    def run(self, names, feed):
        self.plain += 1
        return self.session.run(names, feed)

    def io_binding(self):
        binding = self.session.io_binding()
        bind = binding.bind_output

        def bind_output(name, *given):
            self.bound.append(given[-1])
            bind(name, *given)

        binding.bind_output = bind_output
        return binding


@pytest.fixture
def opened():
    ort = pytest.importorskip("onnxruntime")
    return lambda *given: Watched(ort.InferenceSession(graph(*given), providers=["CPUExecutionProvider"]))


def test_answers_lie_where_they_were_written(opened):
    session = opened(["batch", "total"])
    with OnnxrtRunner(BoundOutputs(session)) as runner:
        for past in (3, 4):
            session.bound.clear()
            found = runner.infer(feed(past), check_inputs=False)
            assert [array.ctypes.data for array in found.values()] == session.bound
            for array, expected in zip(found.values(), session.session.run(None, feed(past)), strict=True):
                assert array.dtype == expected.dtype
                assert np.array_equal(array, expected)
    assert not session.plain


@pytest.mark.parametrize(("answer", "past"), [(["batch", "unknown"], 3), ([None, None], 3)])
def test_where_a_size_does_not_follow_from_the_inputs_onnxruntime_chooses_it(opened, answer, past):
    session = opened(answer)
    with OnnxrtRunner(BoundOutputs(session)) as runner:
        assert runner.infer(feed(past), check_inputs=False)["present"].shape == (2, past + 1)
    assert session.plain == 1
    assert not session.bound


def test_a_format_that_numpy_does_not_know_is_left_to_onnxruntime():
    ports = [SimpleNamespace(name="y", type="tensor(bfloat16)", shape=[2])]
    session = SimpleNamespace(get_inputs=lambda: [], get_outputs=lambda: ports, run=lambda names, feed: ["its own"])
    assert BoundOutputs(session).run(None, {}) == ["its own"]


def test_an_answer_of_another_size_than_the_graph_declares_is_refused_and_not_cut(opened):
    """A bundle whose graph lies about an axis is a failed run, never a comparison of part of the answer."""
    session = opened(["batch", "tokens"])
    with OnnxrtRunner(BoundOutputs(session)) as runner, pytest.raises(Exception, match="hape"):
        runner.infer(feed(3), check_inputs=False)


def test_the_graph_above_is_valid():
    onnx.checker.check_model(onnx.load_from_string(graph(["batch", "total"])))
