"""Rows as slots: whatever joins, leaves, goes back or is copied, each request gets what it would get alone."""

from __future__ import annotations

import numpy as np
import pytest
from refusal import refused

from gqa_export.bundle.manifest import read_manifest
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.runtime.rows import rope_switch
from gqa_export.runtime.torch_session import TorchSession
from gqa_export.targets import get_target, on_cpu

from .conftest import CAPACITY, VOCABULARY
from .row_schedule import Alone, play

OPERATIONS = 200


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """(cache) -> (bundle of a tiny lfm2, its model): convolution states beside attention."""
    from gqa_models import write_tiny

    from gqa_export.checkpoint.load_model import load_model
    from gqa_export.checkpoint.open import open_checkpoint
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx

    checkpoint = write_tiny("lfm2", tmp_path_factory.mktemp("hybrid"))
    folder = tmp_path_factory.mktemp("bundle") / "lfm2"
    export_onnx(checkpoint, folder, ExportOptions("ort", cache="growing", capacity=CAPACITY))
    return folder, load_model(open_checkpoint(checkpoint), "float32")


@pytest.fixture(scope="module")
def interpreted(bundle, tmp_path_factory):
    """The graph with the plugin's op as ONNX Runtime runs it on a CPU, by the op's function body."""
    import shutil

    from gqa_export.validation.reference import _interpreted

    folder = bundle("trt-plugin", "static", "last")
    place = tmp_path_factory.mktemp("interpreted") / "trt-plugin"
    with _interpreted(folder, read_manifest(folder), []) as (_, graph):
        shutil.copytree(graph, place)
    return lambda: OrtSession.load(place, "cpu", target=on_cpu(get_target("trt-plugin")))


def schedule(opened, *, marks: bool = False, vocabulary: int = VOCABULARY) -> dict[str, int]:
    """Lead one session through the schedule and let another answer alone."""
    return play(opened(), Alone(opened()), OPERATIONS, seed=5, vocabulary=vocabulary, longest=CAPACITY - 4, marks=marks)


@pytest.mark.parametrize(("target", "cache"), [("ort", "growing"), ("ort", "static")])
def test_every_row_of_a_random_schedule_is_as_if_it_were_alone(bundle, target, cache) -> None:
    count = schedule(lambda: OrtSession.load(bundle(target, cache), "cpu"))
    assert min(count.values()) > 20


def test_the_schedule_holds_for_the_interpreted_plugin_graph(interpreted) -> None:
    assert min(schedule(interpreted).values()) > 20


def test_the_schedule_holds_for_a_model_with_states_that_goes_back_to_marks(hybrid) -> None:
    folder, _ = hybrid
    vocabulary = read_manifest(folder).spec.vocabulary
    assert read_manifest(folder).spec.states
    assert min(schedule(lambda: OrtSession.load(folder, "cpu"), marks=True, vocabulary=vocabulary).values()) > 20


@pytest.mark.parametrize("kind", ["attention", "states"])
def test_the_schedule_holds_for_pytorch_itself(model, hybrid, kind) -> None:
    chosen = model if kind == "attention" else hybrid[1]
    session, other = (TorchSession(chosen, CAPACITY) for _ in range(2))
    opened = iter((session, other))
    count = play(next(opened), Alone(next(opened)), 40, seed=5, vocabulary=session.vocabulary, longest=CAPACITY - 4,
                 marks=kind == "states")
    assert count["rewind"] > 5


def opened(kind, bundle, model):
    return TorchSession(model, CAPACITY) if kind == "torch" else OrtSession.load(bundle("ort", kind), "cpu")


@pytest.mark.parametrize("kind", ["torch", "growing", "static"])
def test_a_row_operation_that_is_not_possible_is_refused_and_changes_nothing(bundle, model, kind) -> None:
    session = opened(kind, bundle, model)
    session.reset(2)
    session.step(np.full((2, 3), 7))
    for call, code in ((lambda: session.reset_row(2), "E-RUN-ROW"), (lambda: session.reset_row(-1), "E-RUN-ROW"),
                       (lambda: session.mark_row(9), "E-RUN-ROW"), (lambda: session.copy_row(0, 2), "E-RUN-ROW"),
                       (lambda: session.copy_row(5, 0), "E-RUN-ROW"), (lambda: session.reset_row(True), "E-RUN-ROW"),
                       (lambda: session.rewind_row(0, 4), "E-RUN-ROW-LENGTH"),
                       (lambda: session.rewind_row(0, -1), "E-RUN-ROW-LENGTH"),
                       (lambda: session.rewind_row(0, 1.0), "E-RUN-ROW-LENGTH"),
                       (lambda: session.copy_row(0, 1, 4), "E-RUN-ROW-LENGTH")):
        with refused(code):
            call()
    assert session.lengths.tolist() == [3, 3]


@pytest.mark.parametrize("kind", ["torch", "ort"])
def test_a_state_goes_back_to_marked_lengths_only_and_the_refusal_lists_them(hybrid, kind) -> None:
    folder, model = hybrid
    session = TorchSession(model, CAPACITY) if kind == "torch" else OrtSession.load(folder, "cpu")
    session.reset(2)
    session.step(np.full((2, 3), 7))
    assert session.mark_row(0) == 3
    session.step(np.full((2, 2), 7))
    with refused("E-RUN-ROW-STATES") as refusal:
        session.rewind_row(0, 4)
    assert "[0, 3, 5]" in refusal.error.fix
    with refused("E-RUN-ROW-STATES"):
        session.copy_row(1, 0, 3)
    session.rewind_row(0, 3)
    session.rewind_row(1, 5)
    session.copy_row(0, 1, 3)  # a mark goes with the row
    session.reset_row(0)
    assert session.lengths.tolist() == [0, 3]
    with refused("E-RUN-ROW-LENGTH"):
        session.rewind_row(0, 3)


def test_a_row_does_not_go_back_over_the_length_at_which_its_rotary_table_changes(bundle) -> None:
    session = OrtSession.load(bundle(), "cpu")
    assert rope_switch(session) == 0
    session.step(np.full((1, 9), 7))
    object.__setattr__(session, "spec", type("Spec", (), {
        "rope_switch": 6, "states": (), "layers": session.spec.layers, "vocabulary": VOCABULARY})())
    session.rewind_row(0, 8)
    with refused("E-RUN-ROW-ROPE"):
        session.rewind_row(0, 6)
    session.rewind_row(0, 7)
    session.reset_row(0)
    session.step(np.full((1, 6), 7))
    session.rewind_row(0, 5)


def test_idle_rows_ride_along_in_one_call_and_keep_nothing(bundle, monkeypatch) -> None:
    for cache in ("growing", "static"):
        session, alone = (OrtSession.load(bundle("ort", cache), "cpu") for _ in range(2))
        calls: list[int] = []
        inner = session._call
        monkeypatch.setattr(session, "_call", lambda ids, *rest, inner=inner, calls=calls: (
            calls.append(len(ids)), inner(ids, *rest))[1])
        session.reset(3)
        session.step(np.array([[5, 6], [7, 8], [9, 9]]), np.array([2, 2, 2]))
        step = session.step(np.array([[4], [0], [3]]), np.array([1, 0, 1]))
        assert calls == [3, 3]
        assert not step.logits[1].any()
        assert session.lengths.tolist() == [3, 2, 3]
        again = session.step(np.array([[1], [2], [1]])).logits[1, 0]
        expected = alone.step(np.array([[7, 8, 2]])).logits[0, -1]
        assert np.abs(again - expected).max() < 1e-5  # the same sums in another batch


def test_a_request_that_overflowed_leaves_nothing_behind_for_the_next(bundle) -> None:
    """portable and trt-native multiply what lies beyond the length by 0, and 0 times NaN is NaN."""
    for target, cache in (("portable", "growing"), ("portable", "static"), ("ort", "static")):
        session = OrtSession.load(bundle(target, cache), "cpu")
        session.reset(2)
        session.step(np.full((2, 6), 7))
        expected = session.step(np.full((2, 1), 3)).logits[1]
        session._past = [session._backend.upload(_with_nan(session._backend.download(t))) for t in session._past]
        session.reset_row(0)
        session.step(np.full((2, 2), 7), np.array([2, 0]))
        session.rewind_row(1, 6)
        got = session.step(np.full((2, 1), 3)).logits
        assert np.isfinite(got).all()
        assert np.abs(got[1] - expected).max() < 1e-5


def _with_nan(tensor: np.ndarray) -> np.ndarray:
    whole = tensor.copy()
    whole[0] = np.nan
    return whole
