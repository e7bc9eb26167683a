"""Bundles in ONNX Runtime against PyTorch: chunks, ragged batches, both caches, and all that is refused."""

from __future__ import annotations

import numpy as np
import pytest
from refusal import refused

from gqa_export.runtime.feeds import attention_mask, must_run_alone
from gqa_export.runtime.ort import session as session_module
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.runtime.torch_session import TorchSession

from .conftest import ALONE, CAPACITY, RAGGED, VOCABULARY, drive, largest_difference

BUNDLES = [("ort", "growing"), ("ort", "static"), ("onnx", "static"), ("portable", "growing")]


@pytest.fixture(scope="module")
def reference(model):
    session = TorchSession(model, CAPACITY, "fp64")
    return {steps: drive(session, steps) for steps in (ALONE, RAGGED)}


@pytest.fixture(scope="module")
def rounding(model, reference) -> float:
    """What fp32 itself costs: the largest error of PyTorch eager in fp32 on the same steps."""
    session = TorchSession(model, CAPACITY, "fp32")
    return max(largest_difference(drive(session, steps), reference[steps]) for steps in reference)


@pytest.mark.parametrize(("target", "cache"), BUNDLES)
@pytest.mark.parametrize("steps", [ALONE, RAGGED], ids=["alone", "ragged"])
def test_a_bundle_follows_pytorch_through_chunks_and_ragged_rows(
        bundle, reference, rounding, target, cache, steps) -> None:
    got = drive(OrtSession.load(bundle(target, cache), "cpu"), steps)
    # the same sums in another order: a small multiple of what eager loses itself
    assert largest_difference(got, reference[steps]) < 8 * rounding


@pytest.mark.parametrize(("target", "cache"), BUNDLES)
def test_an_injected_callable_gives_what_bound_memory_gives(bundle, target, cache) -> None:
    import onnxruntime

    folder = bundle(target, cache)
    inner = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [port.name for port in inner.get_outputs()]
    session = OrtSession.load(folder, infer=lambda feed: dict(zip(names, inner.run(names, dict(feed)))))
    # the same kernels on the same numbers
    assert largest_difference(drive(session, RAGGED), drive(OrtSession.load(folder, "cpu"), RAGGED)) == 0


def test_growing_and_static_caches_hold_the_same(bundle, rounding) -> None:
    growing, static = (drive(OrtSession.load(bundle("ort", cache), "cpu"), RAGGED) for cache in ("growing", "static"))
    assert largest_difference(growing, static) < 8 * rounding


@pytest.mark.parametrize("steps", [ALONE, RAGGED], ids=["alone", "ragged"])
def test_a_growing_bundle_of_ort_is_run_in_a_buffer_that_doubles(
        bundle, reference, rounding, steps, monkeypatch) -> None:
    """Its nodes are those of a static bundle; the cache is not copied at every step."""
    monkeypatch.setattr(session_module, "BUFFER", 4)
    session = OrtSession.load(bundle("ort", "growing"), "cpu")
    rooms = []
    run = session._backend.run

    def seen(feed, past, inplace):
        assert inplace
        rooms.append(past[0].shape[2])
        return run(feed, past, inplace)

    monkeypatch.setattr(session._backend, "run", seen)
    assert largest_difference(drive(session, steps), reference[steps]) < 8 * rounding
    assert len(set(rooms)) > 1
    assert max(rooms) <= CAPACITY


@pytest.mark.parametrize(("target", "cache"), [("portable", "growing"), ("onnx", "growing"), ("ort", "static")])
def test_other_bundles_have_no_such_buffer(bundle, target, cache) -> None:
    session = OrtSession.load(bundle(target, cache), "cpu")
    assert not session._buffer


def test_rows_of_a_buffer_go_back_and_are_copied(bundle, model, rounding, monkeypatch) -> None:
    monkeypatch.setattr(session_module, "BUFFER", 4)
    sessions = OrtSession.load(bundle("ort", "growing"), "cpu"), TorchSession(model, CAPACITY, "fp64")
    answers = []
    for session in sessions:
        session.reset(2)
        session.step(np.arange(14).reshape(2, 7) + 5)
        session.rewind_row(0, 3)
        session.copy_row(0, 1)
        session.step(np.full((2, 6), 9), np.array([6, 2]))
        answers.append(session.step(np.array([[4], [8]])).logits)
        assert session.lengths.tolist() == [10, 6]
    assert np.abs(answers[0] - answers[1]).max() < 8 * rounding


def test_a_growing_cache_keeps_no_columns_that_belong_to_nobody(bundle) -> None:
    session = OrtSession.load(bundle(), "cpu")
    session.reset(2)
    for width, new in ((6, (6, 2)), (1, (0, 1)), (3, (1, 3)), (1, (1, 1))):
        session.step(np.full((2, width), 7), np.array(new))
        assert session.cache()[0][0].shape[2] == session.lengths.max()


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_padding_at_the_end_of_a_static_cache_is_not_written_past_it(bundle, model, rounding, target) -> None:
    full = CAPACITY - 1
    steps = ((full, (full, 3)), (4, (1, 4)))
    got = drive(OrtSession.load(bundle(target, "static"), "cpu"), steps)
    assert largest_difference(got, drive(TorchSession(model, CAPACITY, "fp64"), steps)) < 8 * rounding


def test_a_step_without_new_tokens_changes_nothing(bundle) -> None:
    session = OrtSession.load(bundle(), "cpu")
    session.reset(2)
    session.step(np.full((2, 3), 9))
    before = session.cache()
    step = session.step(np.zeros((2, 2), np.int64), np.zeros(2, np.int64), want_cache=True)
    assert session.lengths.tolist() == [3, 3]
    assert not step.logits.any()
    for (key, value), (old_key, old_value) in zip(session.cache(), before):
        assert np.array_equal(key, old_key)
        assert np.array_equal(value, old_value)


def test_logits_last_gives_the_last_valid_row(bundle, model, rounding) -> None:
    session, reference = OrtSession.load(bundle("ort", "growing", "last"), "cpu"), TorchSession(model, CAPACITY, "fp64")
    ids, new = np.arange(12).reshape(2, 6) + 3, np.array([6, 2])
    session.reset(2)
    reference.reset(2)
    got, expected = session.step(ids, new).logits, reference.step(ids, new).logits
    assert got.shape == (2, 1, VOCABULARY)
    assert np.abs(got[:, 0] - expected[[0, 1], [5, 1]]).max() < 8 * rounding


def test_low_memory_and_another_working_folder_change_no_logits(bundle, tmp_path, monkeypatch) -> None:
    folder, ids = bundle(), np.arange(8)[None] + 3
    plain = OrtSession.load(folder, "cpu").step(ids).logits
    monkeypatch.chdir(tmp_path)
    # prepacked weights are summed in another order
    assert np.abs(OrtSession.load(folder, "cpu", low_memory=True).step(ids).logits - plain).max() < 1e-4


def test_a_smaller_capacity_may_be_asked_for_and_a_larger_one_not(bundle) -> None:
    session = OrtSession.load(bundle("ort", "static"), "cpu", capacity=8)
    assert session.cache()[0][0].shape[2] == 8
    with refused("E-RUN-CAPACITY"):
        session.step(np.zeros((1, 9), np.int64))
    with refused("E-OPTION-CAPACITY"):
        OrtSession.load(bundle("ort", "static"), "cpu", capacity=CAPACITY + 1)


@pytest.mark.parametrize("kind", ["torch", "growing", "static"])
def test_what_does_not_fit_is_refused_before_anything_runs(bundle, model, kind) -> None:
    session = TorchSession(model, CAPACITY) if kind == "torch" else OrtSession.load(bundle("ort", kind), "cpu")
    session.reset(2)
    session.step(np.full((2, CAPACITY - 1), 5))
    with refused("E-RUN-CAPACITY") as refusal:
        session.step(np.full((2, 2), 5), np.array([1, 2]))
    assert "sequence 1" in refusal.error.where
    assert f"--capacity {CAPACITY + 1}" in refusal.error.fix
    assert session.lengths.tolist() == [CAPACITY - 1] * 2
    session.step(np.full((2, 1), 5))
    assert session.lengths.tolist() == [CAPACITY] * 2


@pytest.mark.parametrize(("ids", "new", "code"), [
    (np.zeros((3, 1), np.int64), None, "E-RUN-SHAPE"),
    (np.zeros(2, np.int64), None, "E-RUN-SHAPE"),
    (np.zeros((2, 0), np.int64), None, "E-RUN-SHAPE"),
    (np.zeros((2, 1)), None, "E-RUN-TYPE"),
    (np.array([[0], [VOCABULARY]]), None, "E-RUN-VOCABULARY"),
    (np.array([[0], [-1]]), None, "E-RUN-VOCABULARY"),
    (np.zeros((2, 3), np.int64), np.array([1, 4]), "E-RUN-LENGTHS"),
    (np.zeros((2, 3), np.int64), np.array([1, -1]), "E-RUN-LENGTHS"),
    (np.zeros((2, 3), np.int64), np.array([1]), "E-RUN-LENGTHS"),
    (np.zeros((2, 3), np.int64), np.array([1.0, 1.0]), "E-RUN-LENGTHS"),
])
def test_a_feed_of_the_wrong_kind_is_refused(bundle, ids, new, code) -> None:
    session = OrtSession.load(bundle(), "cpu")
    session.reset(2)
    with refused(code):
        session.step(ids, new)


def test_a_tokenizers_mask_in_place_of_lengths_is_refused_with_the_side_to_pad_on(bundle) -> None:
    session = OrtSession.load(bundle(), "cpu")
    session.reset(2)
    with refused("E-RUN-LENGTHS") as refusal:
        session.step(np.array([[0, 5, 6], [7, 8, 9]]), np.array([[0, 1, 1], [1, 1, 1]]))
    assert 'padding_side="right"' in refusal.error.fix


def test_ids_in_the_padding_may_be_anything(bundle) -> None:
    session = OrtSession.load(bundle(), "cpu")
    shown = []
    for filler in (0, -100):
        session.reset(2)
        shown.append(session.step(np.array([[5, 6], [7, filler]]), np.array([2, 1])).logits)
    assert np.array_equal(shown[0][0], shown[1][0])
    assert np.array_equal(shown[0][1, 0], shown[1][1, 0])


def test_an_empty_batch_is_refused(bundle) -> None:
    with refused("E-RUN-BATCH"):
        OrtSession.load(bundle(), "cpu").reset(0)


def test_the_mask_counts_past_in_its_first_columns_and_new_in_its_last() -> None:
    mask = attention_mask(np.array([3, 1]), np.array([1, 2]), 3, 2)
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 0, 0, 1, 1]]


def test_the_mask_of_the_whole_row_has_all_ones_first() -> None:
    mask = attention_mask(np.array([3, 1]), np.array([1, 2]), 3, 2, whole_row=True)
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]


def test_which_masks_a_graph_takes_is_read_from_the_graph_and_not_from_the_manifest(bundle) -> None:
    from gqa_export.validation.untrusted import takes_whole_row_masks

    assert takes_whole_row_masks(bundle("ort"))
    assert not takes_whole_row_masks(bundle("portable"))


def test_a_session_gives_the_same_under_both_kinds_of_mask(bundle) -> None:
    for cache in ("growing", "static"):
        ours, theirs = (OrtSession.load(bundle("ort", cache), "cpu") for _ in range(2))
        theirs.whole_row_masks = True
        assert largest_difference(drive(ours, RAGGED), drive(theirs, RAGGED)) == 0


@pytest.mark.parametrize(("lengths", "new", "width", "alone"), [
    ([0, 0], [5, 3], 5, False),  # first prompt
    ([4, 2], [1, 1], 1, False),  # decode
    ([4, 0], [2, 2], 2, True),  # several tokens over a past
    ([4], [2], 2, False),  # the same with one row
    ([4, 2], [1, 0], 1, True),  # a row without tokens
    ([9, 2], [1, 2], 2, True),  # padding would end past the tenth place
])
def test_rows_run_alone_where_the_attention_cannot_take_them_together(lengths, new, width, alone) -> None:
    assert must_run_alone(np.array(lengths), np.array(new), width, capacity=10, chunks_alone=True,
                          empty_alone=True) is alone


def test_a_target_without_those_limits_runs_them_together() -> None:
    lengths, new = np.array([4, 0]), np.array([2, 0])
    assert not must_run_alone(lengths, new, 2, capacity=None, chunks_alone=False, empty_alone=False)
