"""`--hidden-states`: what a head that drafts tokens reads is an output on every target, compared as logits are."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from gqa_models import save_random, write_tiny
from refusal import refused

import gqa_export as gqa
from gqa_export.bundle.manifest import MANIFEST, MODEL, FileFact, read_manifest
from gqa_export.cli.inspect import bundle_lines
from gqa_export.errors import GqaExportError, InvalidBundle, UnsupportedModel
from gqa_export.exporting import genai_config
from gqa_export.files.sha256 import file_sha256
from gqa_export.graph_io import ATTENTION_MASK, HIDDEN_STATES, INPUT_IDS
from gqa_export.runtime.generate import generate
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.validation.cross_check import cross_check

CAPACITY, HIDDEN = 48, 64
FORMS = [("ort", "growing", "all"), ("ort", "static", "last"), ("onnx", "growing", "last"),
         ("portable", "static", "all"), ("trt-plugin", "static", "last"), ("trt-native", "static", "last")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    """(target, cache, logits) -> the bundle with hidden states; not to be changed."""
    made: dict[tuple[str, ...], gqa.Bundle] = {}

    def make(target: str = "ort", cache: str = "growing", logits: str = "all") -> gqa.Bundle:
        key = (target, cache, logits)
        if key not in made:
            made[key] = gqa.export(checkpoint, tmp_path_factory.mktemp("bundle") / "-".join(key), target=target,
                                   cache=cache, logits=logits, capacity=CAPACITY, hidden_states=True)
        return made[key]

    return make


def reference(folder: Path, ids: np.ndarray) -> np.ndarray:
    """The last hidden states of one row in fp64, as transformers gives them."""
    import torch

    from gqa_export.checkpoint.load_model import load_model
    from gqa_export.checkpoint.open import open_checkpoint

    model = load_model(open_checkpoint(folder), "float32").double()
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states[-1][0].numpy()


@pytest.mark.parametrize(("target", "cache", "logits"), FORMS)
def test_every_target_gives_them_for_every_new_token_and_the_suite_compares_them(bundle, checkpoint, target, cache,
                                                                                logits) -> None:
    """Whatever `--logits` is: a drafting head has a cache of its own, into which it reads the whole prompt."""
    made = bundle(target, cache, logits)
    fact = next(fact for fact in made.manifest.outputs if fact.name == HIDDEN_STATES)
    assert (fact.dtype, fact.shape) == ("float32", ("batch", "sequence", HIDDEN))
    verdict = made.validate(checkpoint, steps=2)
    assert verdict.passed, verdict.failure
    assert "hidden states" in verdict.compared


@pytest.mark.parametrize(("cache", "logits"), [("growing", "all"), ("static", "last")])
def test_a_session_returns_those_of_transformers_row_by_row_also_over_a_past(bundle, checkpoint, cache, logits) -> None:
    """1e-5: fp32's rounding in three layers, the largest state being about 4; a wrong row differs by that."""
    rows = np.random.default_rng(8).integers(3, 320, (2, 12))
    session = bundle("ort", cache, logits).session(provider="cpu")
    assert session.hidden_states is None
    session.reset(2)
    found: list[list[np.ndarray]] = [[], []]
    lengths = np.zeros(2, np.int64)
    for counts in ((7, 3), (1, 1), (2, 4), (0, 1), (1, 0)):  # in one call and, where the op wants it, row by row
        new = np.array(counts)
        ids = np.zeros((2, new.max()), np.int64)
        for b, count in enumerate(counts):
            ids[b, :count] = rows[b, lengths[b]: lengths[b] + count]
        session.step(ids, new)
        assert session.hidden_states.shape == (2, new.max(), HIDDEN)
        for b, count in enumerate(counts):
            found[b].append(session.hidden_states[b, :count])
        lengths += new
    for b in range(2):
        expected = reference(checkpoint, rows[b, : lengths[b]])
        np.testing.assert_allclose(np.concatenate(found[b]), expected, atol=1e-5, rtol=0)


def test_they_are_nan_where_a_row_is_padded_on_the_left(bundle) -> None:
    import onnxruntime

    made = bundle()
    session = onnxruntime.InferenceSession(str(made.folder / MODEL), providers=["CPUExecutionProvider"])
    feed = {INPUT_IDS: np.zeros((1, 3), np.int64), ATTENTION_MASK: np.array([[0, 1, 1]])}
    feed |= {fact.name: np.zeros((1, fact.shape[1], 0, fact.shape[3]), np.float32) for fact in made.manifest.inputs[2:]}
    assert np.isnan(session.run([HIDDEN_STATES], feed)[0]).all()


def before_the_norm(model: onnx.ModelProto) -> None:
    """Give the sum that the final norm reads."""
    last = next(node for node in model.graph.node if HIDDEN_STATES in node.output)
    norm = next(node for node in model.graph.node if last.input[1] in node.output)
    assert norm.op_type == "SkipSimplifiedLayerNormalization"
    norm.output.extend([""] * (4 - len(norm.output)))
    norm.output[3] = norm.output[3] or "sum"
    rename(model, norm.output[3])


def of_the_token_before(model: onnx.ModelProto) -> None:
    """Give every token the state of the one before it, the first one its own."""
    model.graph.node.extend([
        onnx.helper.make_node("Slice", ["kept", "z", "minus", "one"], ["most"]),
        onnx.helper.make_node("Slice", ["kept", "z", "first", "one"], ["begin"]),
        onnx.helper.make_node("Concat", ["begin", "most"], ["shifted"], axis=1)])
    for name, value in (("z", 0), ("minus", -1), ("one", 1), ("first", 1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), name))
    rename(model, "shifted")


def a_little_larger(model: onnx.ModelProto) -> None:
    """Give them with a relative error of 1e-4, about a thousand units in the last place."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1.0001, np.float32), "larger"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["kept", "larger"], ["scaled"]))
    rename(model, "scaled")


def rename(model: onnx.ModelProto, given: str) -> None:
    """Let the output be the tensor `given`, and what it was be called "kept" inside."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == HIDDEN_STATES:
                    names[place] = "kept"
    model.graph.node.append(onnx.helper.make_node("Identity", [given], [HIDDEN_STATES]))


@pytest.mark.parametrize("mutation", [before_the_norm, of_the_token_before, a_little_larger])
def test_a_wrong_hidden_state_behind_right_logits_is_caught(bundle, checkpoint, tmp_path, mutation) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(bundle().folder, folder)
    model = onnx.load(folder / MODEL, load_external_data=False)
    mutation(model)
    onnx.save(model, folder / MODEL)
    manifest = read_manifest(folder)
    files = {**manifest.files, MODEL: FileFact((folder / MODEL).stat().st_size, file_sha256(folder / MODEL))}
    (folder / MANIFEST).write_text(replace(manifest, files=files).to_json())
    verdict = gqa.open_bundle(folder).validate(checkpoint, steps=2, check_hashes=False)
    kinds = {kind.kind: kind.passed for case in verdict.cases if case.name == "teacher_forced" for kind in case.kinds}
    assert kinds == {"keys": True, "values": True, "hidden states": False, "logits": True, "cache": True}
    assert verdict.exit_code == 1
    assert "hidden states" in verdict.failure


@pytest.mark.parametrize(("name", "options"), [
    ("granite", {"logits": "last"}), ("lfm2", {}),
    ("llama_tied", {"quantize": "int8", "activations": "exact"})])
def test_models_with_another_way_to_their_head_give_them_before_it(tmp_path, name, options) -> None:
    """Logits are scaled after the head, layers keep states, weights are codes."""
    checkpoint = write_tiny(name, tmp_path / "checkpoint", num_hidden_layers=2)
    made = gqa.export(checkpoint, tmp_path / "bundle", capacity=CAPACITY, hidden_states=True, **options)
    verdict = made.validate(checkpoint, steps=2)
    assert verdict.passed, verdict.failure
    assert "hidden states" in verdict.compared


def test_a_model_whose_hidden_states_have_another_size_than_it_says_is_refused_by_name(tmp_path) -> None:
    import transformers

    config = transformers.OPTConfig(vocab_size=320, hidden_size=64, ffn_dim=96, num_hidden_layers=2,
                                    max_position_embeddings=64, num_attention_heads=4, word_embed_proj_dim=32,
                                    do_layer_norm_before=False)
    checkpoint = save_random(config, tmp_path / "checkpoint")
    with refused("E-MODEL-HIDDEN-STATES", UnsupportedModel):
        gqa.export(checkpoint, tmp_path / "bundle", capacity=CAPACITY, hidden_states=True)
    assert not (tmp_path / "bundle").exists()


def test_ranks_do_not_give_them(checkpoint, tmp_path) -> None:
    with refused("E-OPTION-TENSOR-PARALLEL", GqaExportError):
        gqa.export(checkpoint, tmp_path / "bundle", target="trt-native", tensor_parallel=2, hidden_states=True)


def test_the_manifest_says_their_shape_and_inspect_shows_it(bundle) -> None:
    made = bundle()
    assert any(line.split() == [HIDDEN_STATES, "float32", "[batch,", "sequence,", f"{HIDDEN}]"]
               for line in bundle_lines(gqa.inspect(made.folder)))


def test_a_manifest_with_another_shape_is_refused(bundle, tmp_path) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(bundle().folder, folder)
    path = folder / MANIFEST
    text = path.read_text()
    place = text.index(HIDDEN_STATES)
    path.write_text(text[:place] + text[place:].replace(f" {HIDDEN}\n", " 32\n", 1))
    with refused("E-BUNDLE-MANIFEST", InvalidBundle):
        read_manifest(folder)


def test_onnxruntime_genai_loads_such_a_bundle_and_says_the_same_tokens(bundle) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    made = bundle()
    assert (made.folder / genai_config.FILE).is_file()
    prompt = list(range(5, 14))
    ours = generate(OrtSession.load(made.folder, "cpu"), [prompt], 6, made.manifest.tokens["eos"]).tokens[0]
    model = genai.Model(str(made.folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + len(ours))
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[len(prompt):].tolist() == ours


def test_a_step_in_which_no_row_brings_anything_has_hidden_states_of_its_shape(bundle) -> None:
    session = OrtSession.load(bundle().folder, "cpu")
    session.reset(2)
    session.step(np.full((2, 3), 5))
    assert session.step(np.zeros((2, 1), np.int64), np.array([0, 0])).hidden.shape == (2, 1, HIDDEN)


@pytest.mark.parametrize("reverse", [False, True])
def test_bundles_with_and_without_them_are_compared_and_the_report_says_that_these_are_not(
        bundle, checkpoint, tmp_path, reverse) -> None:
    plain = gqa.export(checkpoint, tmp_path / "plain", target="ort", capacity=CAPACITY)
    folders = [bundle().folder, plain.folder]
    (verdict,) = cross_check(folders[::-1] if reverse else folders, steps=2)
    assert verdict.passed, verdict.failure
    assert any("hidden states were not compared" in note for note in verdict.notes)
