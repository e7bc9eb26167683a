"""Every command reads the model that the stored tensors are of: its own head is one, a tensor too many is refused."""

from __future__ import annotations

import json

import gqa_models
import pytest
import torch
import transformers
from refusal import refused
from safetensors.torch import load_file, save_file
from small_text import SENTENCES, byte_tokenizer

import gqa_export as gqa
from gqa_export.checkpoint.decided import decided_by_weights
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import InvalidCheckpoint, UnsupportedModel

from .test_tied_weights import HEAD, with_head

pytestmark = pytest.mark.whole_model


@pytest.fixture
def apart(tmp_path):
    """A checkpoint that says it is tied and stores a head of its own."""
    folder = with_head(tmp_path / "ck", lambda rows: rows.flip(0))
    byte_tokenizer(folder)
    return folder


@pytest.fixture
def with_biases(tmp_path):
    """A checkpoint with biases that its configuration does not have."""
    folder = gqa_models.write_tiny("llama", tmp_path / "ck", num_hidden_layers=2)
    byte_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    rows = tensors["model.layers.0.self_attn.q_proj.weight"].shape[0]
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(rows)}, folder / "model.safetensors",
              metadata={"format": "pt"})
    return folder


@pytest.fixture
def text(tmp_path):
    (tmp_path / "book.txt").write_text("".join(SENTENCES) * 40)
    return str(tmp_path / "book.txt")


def is_untied(folder) -> bool:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    return model.lm_head.weight is not model.model.embed_tokens.weight and HEAD in stored and not json.loads(
        (folder / "config.json").read_text())["tie_word_embeddings"]


def test_the_weights_decide_whether_a_head_is_tied(apart, tmp_path):
    assert decided_by_weights(open_checkpoint(apart)).untied
    equal = with_head(tmp_path / "equal", torch.clone)
    decided = decided_by_weights(open_checkpoint(equal))
    assert not decided.untied
    assert decided.config.tie_word_embeddings


def test_a_conversion_keeps_a_head_of_its_own_and_says_so(apart, tmp_path):
    gqa.convert(apart, tmp_path / "out", kv_heads=1)
    assert is_untied(tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[HEAD],
                       load_file(apart / "model.safetensors")[HEAD])


def test_a_training_trains_a_head_of_its_own(apart, tmp_path, text):
    gqa.uptrain(apart, tmp_path / "out", text=text, steps=1, length=16, batch=2, eval_rows=2)
    assert is_untied(tmp_path / "out")


def test_a_bisection_of_a_bundle_with_a_head_of_its_own_finds_nothing(apart, tmp_path):
    assert gqa.export(apart, tmp_path / "out", capacity=64).bisect(apart).finding is None


@pytest.mark.parametrize("command", ["convert", "uptrain", "teacher", "bisect"])
def test_a_tensor_that_the_model_does_not_use_is_refused_unless_ignored(with_biases, tmp_path, text, command):
    def run(**more):
        shown = tmp_path / ("ignored" if more else "refused")
        if command == "convert":
            return gqa.convert(with_biases, shown, kv_heads=1, **more).notes
        if command == "bisect":
            return bundle.bisect(with_biases, **more).notes
        teacher = with_biases if command == "teacher" else None
        student = plain if command == "teacher" else with_biases
        return gqa.uptrain(student, shown, text=text, teacher=teacher, steps=1, length=16, batch=2, eval_rows=2,
                           **more).notes

    plain = gqa_models.write_tiny("llama", tmp_path / "plain", num_hidden_layers=2)
    byte_tokenizer(plain)
    if command == "bisect":
        bundle = gqa.export(with_biases, tmp_path / "bundle", capacity=64, ignore_unused=True)
    with refused("E-CKPT-TENSORS-UNUSED", InvalidCheckpoint) as refusal:
        run()
    assert "q_proj.bias" in refusal.error.what
    notes = run(ignore_unused=True)
    assert command == "teacher" or any("q_proj.bias" in note for note in notes)


@pytest.mark.parametrize("use", [lambda folder, out: gqa.export(folder, out, capacity=64, trace_cache=False),
                                 lambda folder, out: gqa.convert(folder, out, kv_heads=1)], ids=["export", "convert"])
def test_tensors_that_a_model_ties_whatever_its_configuration_says_are_refused(tmp_path, monkeypatch, use):
    """A class that shares the parameter itself: untying the configuration does not help."""
    made = transformers.LlamaForCausalLM.__init__

    def shared(model, *given, **named):
        made(model, *given, **named)
        model.lm_head.weight = model.model.embed_tokens.weight

    folder = with_head(tmp_path / "ck", lambda rows: rows.flip(0))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", shared)
    with refused("E-MODEL-TIED", UnsupportedModel) as refusal:
        use(folder, tmp_path / "out")
    assert HEAD in refusal.error.what
    assert not (tmp_path / "out").exists()
