"""`--ragged-chunks`: rows that bring several tokens each, over a past, in one call of GroupQueryAttention.

ONNX Runtime 1.32 gave the op an input, `query_seqlens`; without it the rows of such a step run one by one, which is
what all other bundles do, and what 1.31 can do.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from gqa_models import write_tiny
from refusal import refused

import gqa_export as gqa
from gqa_export.bundle.manifest import MANIFEST, MODEL, FileFact, read_manifest
from gqa_export.errors import GqaExportError, InvalidBundle, NotCheckedHere, UnsupportedModel
from gqa_export.files.sha256 import file_sha256
from gqa_export.lowering.ort.position_guard import QUERY_SEQLENS
from gqa_export.runtime.ort import loading
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.runtime.torch_session import TorchSession

from .conftest import CAPACITY, VOCABULARY, write_byte_tokenizer
from .row_schedule import Alone, play
from .test_genai import RAGGED, through_engine
from .test_rows import OPERATIONS
from .test_trt import TOLERANCE

ROWS = 4
# new tokens of each row: prompts of different lengths, chunks over pasts of different lengths, rows that rest, one that
# is empty until the last step
STEPS = ((5, 9, 2, 0), (3, 1, 7, 0), (1, 0, 1, 0), (2, 14, 3, 0), (3, 2, 4, 6), (1, 0, 1, 1))


@pytest.fixture(scope="module")
def ragged(checkpoint, tmp_path_factory):
    """(cache, **options) -> a bundle of the tiny Mistral (window 16) with the option; not to be changed."""
    made: dict[tuple, gqa.Bundle] = {}

    def make(cache: str = "growing", **options) -> gqa.Bundle:
        key = (cache, *options.items())
        if key not in made:
            made[key] = gqa.export(checkpoint, tmp_path_factory.mktemp("ragged") / "bundle", cache=cache,
                                   capacity=CAPACITY, ragged_chunks=True, **options)
        return made[key]

    return make


def counted(session) -> list[int]:
    """The rows of every call that the session makes from now on."""
    calls: list[int] = []
    backend, run = session._backend, session._backend.run

    def noting(feed, *rest):
        calls.append(len(feed["input_ids"]))
        return run(feed, *rest)

    backend.run = noting
    return calls


def drive(session) -> list[np.ndarray]:
    """The logits of every valid token, step by step."""
    random, found = np.random.default_rng(7), []
    session.reset(ROWS)
    for counts in STEPS:
        ids = random.integers(3, VOCABULARY, (ROWS, max(counts)))
        logits = session.step(ids, np.array(counts)).logits
        found += [logits[b, :count] for b, count in enumerate(counts)]
    return found


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_ragged_chunks_over_pasts_are_one_call_and_equal_pytorch_row_by_row(ragged, model, cache) -> None:
    session = OrtSession.load(ragged(cache).folder, "cpu")
    calls = counted(session)
    for got, expected in zip(drive(session), drive(TorchSession(model, CAPACITY, "fp64")), strict=True):
        np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)
    assert calls == [ROWS] * len(STEPS)


def test_a_step_that_is_mostly_padding_runs_row_by_row_on_a_cpu(ragged, model) -> None:
    """Three rows of one token beside one of 30: 87 tokens of padding take longer than reading the weights three times
    more. On a GPU they do not."""
    session, reference = OrtSession.load(ragged().folder, "cpu"), TorchSession(model, CAPACITY, "fp64")
    calls = counted(session)
    for each in (session, reference):
        each.reset(ROWS)
        each.step(np.full((ROWS, 2), 7))
    ids, new = np.random.default_rng(3).integers(3, VOCABULARY, (ROWS, 30)), np.array([1, 30, 1, 1])
    got, expected = (each.step(ids, new).logits for each in (session, reference))
    for b, count in enumerate(new):
        np.testing.assert_allclose(got[b, :count], expected[b, :count], atol=TOLERANCE, rtol=0)
    assert calls == [ROWS, 1, 1, 1, 1]


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_a_step_whose_padding_would_pass_the_end_of_the_cache_runs_row_by_row(ragged, model, cache) -> None:
    """The op refuses such padding. The longest row is filled to the last place."""
    session, reference = OrtSession.load(ragged(cache).folder, "cpu"), TorchSession(model, CAPACITY, "fp64")
    calls = counted(session)
    for each in (session, reference):
        each.reset(2)
        each.step(np.full((2, 45), 7), np.array([45, 3]))
    ids, new = np.random.default_rng(3).integers(3, VOCABULARY, (2, 5)), np.array([3, 5])
    got, expected = (each.step(ids, new).logits for each in (session, reference))
    for b, count in enumerate(new):
        np.testing.assert_allclose(got[b, :count], expected[b, :count], atol=TOLERANCE, rtol=0)
    assert calls == [2, 1, 1]
    assert session.lengths.tolist() == [48, 8]


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_without_the_option_the_rows_of_such_a_step_run_one_by_one_with_the_same_answers(ragged, bundle, cache) -> None:
    """The way of ONNX Runtime 1.31, and of every bundle that was exported before."""
    folder = bundle("ort", cache)
    assert not read_manifest(folder).needs
    session = OrtSession.load(folder, "cpu")
    calls = counted(session)
    for got, expected in zip(drive(session), drive(OrtSession.load(ragged(cache).folder, "cpu")), strict=True):
        np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)
    assert set(calls) == {1, ROWS}


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_the_schedule_of_joins_leaves_rewinds_and_copies_holds_in_one_call_a_step(ragged, bundle, cache) -> None:
    session = OrtSession.load(ragged(cache).folder, "cpu")
    calls = counted(session)
    count = play(session, Alone(OrtSession.load(bundle("ort", cache), "cpu")), OPERATIONS, seed=5,
                 vocabulary=VOCABULARY, longest=CAPACITY - 4, marks=False)
    assert min(count.values()) > 20
    # one call a step, but for steps whose padding would pass the end, or where a full row rests
    assert calls.count(ROWS) > 0.8 * count["step"]


@pytest.mark.parametrize(("cache", "options"), [("growing", {}), ("static", {"logits": "last"})])
def test_the_suite_passes_with_its_ragged_steps(ragged, checkpoint, cache, options) -> None:
    verdict = ragged(cache, **options).validate(checkpoint, steps=8)
    assert verdict.passed, verdict.failure
    assert any(case.name == "ragged" for case in verdict.cases)


@pytest.mark.parametrize(("name", "options"), [
    ("gemma2", {"dtype": "fp16"}), ("llama", {"kv_cache": "int8", "cache": "static"})])
def test_windows_caps_halves_and_a_cache_of_codes_take_such_chunks_too(tmp_path, name, options) -> None:
    checkpoint = write_tiny(name, tmp_path / "checkpoint", num_hidden_layers=2)
    if "kv_cache" in options:
        write_byte_tokenizer(checkpoint)
        options = {**options, "calibrate": tmp_path / "text.txt"}
        options["calibrate"].write_text("Ships sail by night, and by day they rest in the harbour. " * 30)
    made = gqa.export(checkpoint, tmp_path / "bundle", capacity=CAPACITY, ragged_chunks=True, **options)
    verdict = made.validate(checkpoint, steps=8)
    assert verdict.passed, verdict.failure


def test_onnxruntime_genai_serves_four_ragged_prompts_with_such_a_bundle(ragged, bundle) -> None:
    pytest.importorskip("onnxruntime_genai")
    expected = through_engine(bundle("ort", "growing"), RAGGED, 8)
    assert through_engine(ragged().folder, RAGGED, 8) == expected


def test_a_wrong_count_of_new_tokens_is_caught_by_the_suite(ragged, checkpoint, tmp_path) -> None:
    """One token fewer than a row brings, if it brings several: its last one is taken for padding."""
    folder = tmp_path / "wrong"
    shutil.copytree(ragged("static").folder, folder)  # over a growing cache the op itself notices, and fails
    model = onnx.load(folder / MODEL, load_external_data=False)
    cast = next(node for node in model.graph.node if node.name == "guard/new_tokens/Cast")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1], np.int64), "too_few"))
    place = list(model.graph.node).index(cast)
    model.graph.node.insert(place, onnx.helper.make_node("Sub", [cast.input[0], "too_few"], ["less"]))
    model.graph.node.insert(place + 1, onnx.helper.make_node("Max", ["less", "too_few"], ["fewer"]))
    model.graph.node[place + 2].input[0] = "fewer"
    onnx.save(model, folder / MODEL)
    manifest = read_manifest(folder)
    fact = FileFact((folder / MODEL).stat().st_size, file_sha256(folder / MODEL))
    (folder / MANIFEST).write_text(replace(manifest, files={**manifest.files, MODEL: fact}).to_json())
    verdict = gqa.open_bundle(folder).validate(checkpoint, steps=8)
    assert not next(case for case in verdict.cases if case.name == "ragged").passed


def test_the_bundle_says_what_it_needs_and_an_older_runtime_is_refused_before_it_is_asked(ragged, monkeypatch) -> None:
    made = ragged()
    assert made.manifest.ragged_chunks
    assert made.manifest.needs == {"onnxruntime": "1.32"}
    nodes = [node for node in onnx.load(made.folder / MODEL, load_external_data=False).graph.node
             if node.op_type == "GroupQueryAttention"]
    assert nodes
    assert all(node.input[QUERY_SEQLENS] for node in nodes)
    for version in ("1.31.1", "1.9", "1.31.0.dev20260101+cpu"):
        monkeypatch.setattr(loading.import_onnxruntime(), "__version__", version)
        with refused("E-ENV-VERSION", NotCheckedHere) as refusal:
            OrtSession.load(made.folder, "cpu")
        assert version in refusal.error.what
    for version in ("1.32.0", "1.40.1+cu13", "2.0"):
        loading.check_needs(made.manifest, version)


@pytest.mark.parametrize("needs", ['{"onnxruntime": "new"}', '{"onnxruntime": 1.32}', '["onnxruntime"]'])
def test_a_manifest_with_another_kind_of_need_is_refused(ragged, tmp_path, needs) -> None:
    text = (ragged().folder / MANIFEST).read_text()
    place = text.index('"needs": {')
    (tmp_path / MANIFEST).write_text(f'{text[:place]}"needs": {needs}{text[text.index("}", place) + 1:]}')
    with refused("E-BUNDLE-MANIFEST", InvalidBundle):
        read_manifest(tmp_path)


@pytest.mark.parametrize("target", ["onnx", "portable", "trt-plugin", "trt-native"])
def test_targets_that_take_such_chunks_as_they_are_refuse_the_option_by_name(checkpoint, tmp_path, target) -> None:
    with refused("E-TARGET-OPTION", GqaExportError):
        gqa.export(checkpoint, tmp_path / "bundle", target=target, ragged_chunks=True)


def test_a_model_with_states_and_a_graph_for_long_prompts_refuse_it(checkpoint, tmp_path) -> None:
    from gqa_export.exporting.long_plan import LongOptions

    hybrid = write_tiny("lfm2", tmp_path / "lfm2")
    with refused("E-MODEL-RAGGED-CHUNKS", UnsupportedModel):
        gqa.export(hybrid, tmp_path / "bundle", ragged_chunks=True)
    with refused("E-OPTION-RAGGED-CHUNKS", GqaExportError):
        gqa.export(checkpoint, tmp_path / "bundle", ragged_chunks=True, long_attention=LongOptions())


def test_masks_with_all_ones_first_let_rows_run_alone_where_they_do_not_tell_new_tokens(ragged, model) -> None:
    """12 ones of 13 columns are a past of 9 with 3 new tokens as well as one of 8 with 4."""
    session, reference = OrtSession.load(ragged().folder, "cpu"), TorchSession(model, CAPACITY, "fp64")
    session.whole_row_masks = True
    random = np.random.default_rng(5)
    for each in (session, reference):
        each.reset(2)
    for counts in ((9, 8), (4, 4), (1, 1), (3, 5)):
        ids = random.integers(3, VOCABULARY, (2, max(counts)))
        got, expected = (each.step(ids, np.array(counts)).logits for each in (session, reference))
        for b, count in enumerate(counts):
            np.testing.assert_allclose(got[b, :count], expected[b, :count], atol=TOLERANCE, rtol=0)


def test_a_row_that_is_full_rests_while_another_goes_on(ragged, model) -> None:
    """A row that brings nothing is fed a token that is not kept; a full one has no place for it."""
    session, reference = OrtSession.load(ragged().folder, "cpu"), TorchSession(model, CAPACITY, "fp64")
    for each in (session, reference):
        each.reset(2)
        each.step(np.full((2, CAPACITY), 7), np.array([CAPACITY, 3]))
    for token in (9, 12):
        got, expected = (each.step(np.full((2, 1), token), np.array([0, 1])).logits for each in (session, reference))
        np.testing.assert_allclose(got[1], expected[1], atol=TOLERANCE, rtol=0)
