"""What users of a growing `ort` bundle run, a cache in place in a buffer that doubles, is part of the verdict on it."""

from __future__ import annotations

import numpy as np
import pytest
from gqa_models import write_tiny
from small_text import SENTENCES, byte_tokenizer

import gqa_export as gqa
from gqa_export.compare.suite import IN_PLACE
from gqa_export.runtime.ort import row_slots
from gqa_export.runtime.ort.backend import BindingBackend, DeviceTensor
from gqa_export.runtime.ort.session import OrtSession

pytestmark = pytest.mark.whole_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_tiny("llama", tmp_path_factory.mktemp("llama") / "checkpoint", num_hidden_layers=2)
    byte_tokenizer(folder)
    (folder.parent / "text.txt").write_text("".join(SENTENCES))
    return folder


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    made: dict[tuple, gqa.Bundle] = {}

    def get(**options) -> gqa.Bundle:
        key = tuple(sorted(options.items()))
        if key not in made:
            text = {"calibrate": checkpoint.parent / "text.txt"} if "kv_cache" in options else {}
            made[key] = gqa.export(checkpoint, tmp_path_factory.mktemp("b") / "bundle", capacity=64, **options, **text)
        return made[key]

    return get


def found(verdict) -> list:
    return [case for case in verdict.cases if case.entry == IN_PLACE]


@pytest.mark.parametrize("options", [{}, {"quantize": "int4"}, {"kv_cache": "int8", "logits": "last"}],
                         ids=lambda options: "-".join(options.values()) or "plain")
def test_a_growing_bundle_is_run_as_its_users_run_it(bundles, checkpoint, options, monkeypatch) -> None:
    """Of the same graph and weights, the logits are the same to the last bit here; the bound allows another order of
    addition."""
    opened, rooms, make_room = [], [], row_slots.OrtRowSlots._make_room

    def seen(session, tokens):
        make_room(session, tokens)
        rooms.append(session._buffer)

    monkeypatch.setattr(row_slots.OrtRowSlots, "_make_room", seen)
    load = OrtSession.load.__func__
    monkeypatch.setattr(OrtSession, "load", classmethod(lambda cls, *given, **named: opened.append(named.get("opened"))
                                                        or load(cls, *given, **named)))
    verdict = bundles(**options).validate(checkpoint, steps=1)
    assert verdict.passed, verdict.failure
    (case,) = found(verdict)
    assert [kind.kind for kind in case.kinds] == ["logits", "cache"]
    assert all(kind.max_abs == 0 < kind.bound for kind in case.kinds)
    assert set(rooms) == {0, 8, 16}, "the buffer doubled while rows lay in it"
    assert sum(each is not None for each in opened) == 1, "no second session of ONNX Runtime is made"


@pytest.mark.parametrize("options", [{"cache": "static"}, {"target": "onnx"}],
                         ids=lambda options: "-".join(options.values()))
def test_other_bundles_have_no_such_case(bundles, checkpoint, options) -> None:
    assert not found(bundles(**options).validate(checkpoint, steps=1))


def lost(session, tokens):
    """A buffer that grows and forgets what it held."""
    if session._buffer and tokens > session._buffer:
        session._buffer = min(session.capacity, max(tokens, 2 * session._buffer))
        session._past = [session._backend.upload(np.zeros((*t.shape[:2], session._buffer, t.shape[3]), t.owner.dtype))
                         for t in session._past]


def neighbour(backend, tensor, b):
    """Each row reads and writes the memory of the first."""
    return DeviceTensor(tensor.owner, tensor.pointer, (1, *tensor.shape[1:]), part=True)


def crossed(run):
    """Values go where keys belong."""
    def change(backend, feed, past, inplace):
        logits, present, hidden = run(backend, feed, past, inplace)
        return logits, [present[i ^ 1] for i in range(len(present))], hidden
    return change


@pytest.mark.parametrize(("place", "name", "broken"), [
    (row_slots.OrtRowSlots, "_make_room", lost), (BindingBackend, "row", neighbour),
    (BindingBackend, "run", crossed(BindingBackend.run))], ids=["lost", "neighbour", "crossed"])
def test_a_fault_of_that_path_alone_fails_the_verdict(bundles, checkpoint, monkeypatch, place, name, broken) -> None:
    monkeypatch.setattr(place, name, broken)
    verdict = bundles().validate(checkpoint, steps=1)
    assert not verdict.passed
    assert [case.entry for case in verdict.cases if not case.passed] == [IN_PLACE]
    assert "in_place" in verdict.failure
