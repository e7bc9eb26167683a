"""Rotary embeddings that depend on the length: longrope's two tables, dynamic NTK, YaRN beyond the stated positions."""

from __future__ import annotations

import hashlib
import json

import gqa_models
import numpy as np
import onnx
import pytest
import torch
import transformers
from packaging.version import Version
from refusal import refused

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import EXIT_DIFFERENT, EXIT_PASSED, UnsupportedModel
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.runtime.generate import generate
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.validation.validate import validate

pytestmark = pytest.mark.whole_model

ORIGINAL, CAPACITY = 32, 96
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0]}
EIGHT = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
         "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]}
SIXTEEN = {"short_factor": [1.0 + 0.1 * i for i in range(16)], "long_factor": [1.0 + 0.5 * i for i in range(16)]}
MADE = {
    # as Phi-4-mini: partial rotary
    "phi3": ("phi3", {"original_max_position_embeddings": ORIGINAL,
                      "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75}}),
    # another class, and the attention factor given
    "llama": ("llama", {"rope_parameters": {**LONGROPE, **EIGHT, "attention_factor": 1.3}}),
    # one type of layers of two
    "gemma3": ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                                              "full_attention": {**LONGROPE, **SIXTEEN, "factor": 4.0}}}),
    # as Phi-3.5-MoE, whose own code compares the length and scales by it
    "phimoe": ("phimoe", {"original_max_position_embeddings": ORIGINAL,
                          "rope_parameters": {**LONGROPE, **EIGHT, "short_mscale": 1.1, "long_mscale": 1.4}}),
}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """A tiny longrope checkpoint by name, written once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(name):
        base, changes = MADE[name]
        return root / name if (root / name).exists() else gqa_models.write_tiny(base, root / name, **changes)

    return get


def passes(checkpoint, folder, level="quick", **options):
    """Export, validate, and what `export_onnx` gives."""
    export = export_onnx(checkpoint, folder, ExportOptions(**{"capacity": CAPACITY, **options}))
    verdict = validate(folder, checkpoint, level=level, check_hashes=False, steps=8)
    assert verdict.exit_code == EXIT_PASSED, verdict
    return export, {case.name for case in verdict.cases}


@pytest.mark.parametrize(("name", "target", "cache"), [
    ("phi3", "ort", "growing"), ("phi3", "ort", "static"), ("phi3", "onnx", "growing"), ("phi3", "onnx", "static"),
    ("phi3", "portable", "growing"), ("phi3", "trt-native", "static"), ("phi3", "trt-plugin", "static"),
    ("llama", "ort", "growing"), ("gemma3", "onnx", "growing"), ("gemma3", "trt-plugin", "static"),
    ("phimoe", "ort", "growing")])
def test_longrope_beyond_its_original_length_passes_on_both_sides_of_it(checkpoint_of, tmp_path, name, target, cache):
    if name == "gemma3" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("transformers 5.20 fails when layers of one type change their table a second time")
    export, cases = passes(checkpoint_of(name), tmp_path / "bundle", "full" if name == "phi3" else "quick",
                           target=target, cache=cache)
    assert {"switch", "switched"} <= cases
    assert export.manifest.spec.rope_switch == ORIGINAL
    assert any("both tables" in note for note in export.notes)
    if target in ("ort", "trt-plugin"):
        assert any("longrope" in remark for remark in export.remarks)


def swapped(graph):
    """The two tables exchanged."""
    choices = [node for node in graph.node if node.op_type == "Where" and "rotary" in node.name]
    assert choices
    for node in choices:
        node.input[1], node.input[2] = node.input[2], node.input[1]


def moved(step):
    """The switch at another length."""
    def change(graph):
        makers = {name: node for node in graph.node for name in node.output}
        choices = [node for node in graph.node if node.op_type == "Where" and "rotary" in node.name]
        compared = set()
        for node in choices:
            while node.op_type != "Greater":
                node = makers[node.input[0]]
            compared.add(node.input[1])
        limits = [tensor for tensor in graph.initializer if tensor.name in compared]
        assert limits
        for tensor in limits:
            values = onnx.numpy_helper.to_array(tensor)
            assert (values == ORIGINAL).all()
            tensor.CopyFrom(onnx.numpy_helper.from_array((values + step).astype(values.dtype), tensor.name))
    return change


@pytest.mark.parametrize("change", [swapped, moved(1), moved(-1)], ids=["swapped", "later", "earlier"])
def test_the_wrong_table_or_a_switch_off_by_one_is_caught(checkpoint_of, tmp_path, change):
    export_onnx(checkpoint_of("phi3"), tmp_path / "bundle", ExportOptions(capacity=CAPACITY))
    model = onnx.load(tmp_path / "bundle" / "model.onnx", load_external_data=False)
    change(model.graph)
    content = model.SerializeToString()
    (tmp_path / "bundle" / "model.onnx").write_bytes(content)
    manifest = json.loads((tmp_path / "bundle" / "gqa_export.json").read_text())
    manifest["files"]["model.onnx"].update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest["spec"]["rope_switch"] = 0  # a manifest from outside decides nothing
    (tmp_path / "bundle" / "gqa_export.json").write_text(json.dumps(manifest))
    verdict = validate(tmp_path / "bundle", checkpoint_of("phi3"), steps=4)
    assert verdict.exit_code == EXIT_DIFFERENT
    assert {case.name for case in verdict.cases if not case.passed} & {"switch", "switched"}


def test_longrope_within_its_original_length_has_one_table(checkpoint_of, tmp_path):
    export, cases = passes(checkpoint_of("llama"), tmp_path / "bundle", capacity=ORIGINAL)
    assert "switch" not in cases
    assert export.manifest.spec.rope_switch == 0
    assert any("short table alone" in note for note in export.notes)
    assert export.remarks == ()


def reference(model, prompt):
    """transformers' logits of a prompt alone, in one call."""
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0].numpy()


@pytest.mark.parametrize("name", ["phi3", "llama", "phimoe"])
def test_each_row_of_a_batch_chooses_as_transformers_does_for_it_alone(checkpoint_of, tmp_path, name):
    export_onnx(checkpoint_of(name), tmp_path / "bundle", ExportOptions(capacity=CAPACITY))
    model = load_model(open_checkpoint(checkpoint_of(name)), "fp32")
    session, random = OrtSession.load(tmp_path / "bundle", "cpu"), np.random.default_rng(4)
    prompts = [random.integers(4, 300, length) for length in (ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 60, 3)]
    ids = np.zeros((len(prompts), 60), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    session.reset(len(prompts))
    logits = session.step(ids, np.array([len(prompt) for prompt in prompts])).logits
    for row, prompt in enumerate(prompts):
        # fp32 on logits of about 1: 1e-6 seen; the other table is 0.3 off
        np.testing.assert_allclose(logits[row, : len(prompt)], reference(model, prompt.tolist()), atol=2e-5)


@pytest.mark.parametrize("length", [ORIGINAL - 5, ORIGINAL, ORIGINAL + 9])
def test_generation_across_the_switch_equals_transformers_generate(checkpoint_of, tmp_path, length):
    export_onnx(checkpoint_of("phi3"), tmp_path / "bundle", ExportOptions(capacity=CAPACITY))
    model = load_model(open_checkpoint(checkpoint_of("phi3")), "fp32")
    prompt = np.random.default_rng(length).integers(4, 300, length).tolist()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None,
                              pad_token_id=0)[0, length:].tolist()
    session = OrtSession.load(tmp_path / "bundle", "cpu")
    # pieces of 8 tokens: a prompt beyond the switch is fed at once all the same; the other row stays below it
    assert generate(session, [prompt, prompt[:4]], 20, prefill_piece=8).tokens[0] == expected


def test_layers_that_switch_at_different_lengths_are_refused(tmp_path):
    tables = {kind: {**LONGROPE, **SIXTEEN, "factor": 2.0, "original_max_position_embeddings": length}
              for kind, length in (("sliding_attention", 16), ("full_attention", 32))}
    checkpoint = gqa_models.write_tiny("gemma3", tmp_path / "checkpoint", rope_parameters=tables)
    with refused("E-MODEL-ROPE-SWITCHES", UnsupportedModel):
        export_onnx(checkpoint, tmp_path / "bundle", ExportOptions(capacity=64))
    passes(checkpoint, tmp_path / "bundle", capacity=16)


def test_a_dynamic_rotary_is_accepted_up_to_the_length_where_it_changes(tmp_path):
    checkpoint = gqa_models.write_tiny("llama_dynamic", tmp_path / "checkpoint")
    limit = open_checkpoint(checkpoint).config["max_position_embeddings"]
    export, _ = passes(checkpoint, tmp_path / "bundle", capacity=limit, level="full")
    assert any("dynamic" in note for note in export.notes)
    with refused("E-MODEL-ROPE-DYNAMIC", UnsupportedModel) as refusal:
        export_onnx(checkpoint, tmp_path / "other", ExportOptions(capacity=limit + 1))
    assert f"--capacity {limit} " in refusal.error.fix


def test_yarn_reaches_its_factor_times_the_original_length(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    checkpoint = gqa_models.write_tiny("qwen2", tmp_path / "checkpoint", max_position_embeddings=64,
                                       rope_parameters=rope)
    export, _ = passes(checkpoint, tmp_path / "bundle", "full", capacity=256)
    assert export.manifest.spec.max_positions == 256
    with refused("E-OPTION-CAPACITY") as refusal:
        export_onnx(checkpoint, tmp_path / "other", ExportOptions(capacity=257))
    assert "256" in refusal.error.fix
