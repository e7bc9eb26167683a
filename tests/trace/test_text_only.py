"""Multimodal models as text models: parts that cannot be built, block masks without blocks, languages, and the words of
refusals that are about a model's own code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gqa_models.shrink import small_config, write_small
from refusal import refused
from safetensors.numpy import load_file, save_file

import gqa_export as gqa
from gqa_export.checkpoint.building import absent_parts, building, without_absent_parts
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.unused_tensors import unused_notes
from gqa_export.errors import InvalidCheckpoint, UnsupportedModel
from gqa_export.trace.probe import text_masks
from gqa_export.trace.probe.layer_probe import probe

MULTIMODAL = "gemma4_unified"
WITH_A_PACKAGE = "gemma3n"


@pytest.mark.parametrize("level", ["text", "images"])
def test_a_block_mask_without_blocks_is_the_mask_of_text(level):
    import transformers.masking_utils as masks

    config, image = small_config(MULTIMODAL), level == "images"
    with text_masks.of_text(config):
        numbers = torch.full((1, 4), 0 if image else -1)
        shown = masks.blockwise_overlay(torch.nn.functional.pad(numbers, (0, 2), value=-1))
        one, other = torch.tensor(1), torch.tensor(3)
        assert bool(shown(0, 0, one, other)) is image
    assert masks.blockwise_overlay.__name__ == "blockwise_overlay"


def test_numbers_that_padding_or_arithmetic_changed_are_not_taken_for_text():
    with text_masks.of_text(small_config(MULTIMODAL)):
        numbers = torch.full((1, 4), -1)
        assert getattr(torch.nn.functional.pad(numbers, (0, 2), value=-1), text_masks.KNOWN) == -1
        for made in (torch.nn.functional.pad(numbers, (0, 2)), numbers + 1, numbers.clone()):
            assert not hasattr(made, text_masks.KNOWN)


def test_windows_behind_a_block_mask_are_found():
    config = small_config(MULTIMODAL)
    assert {layer.window for layer in probe(config).layers} == {0, config.get_text_config().sliding_window}


def test_an_encoder_whose_package_is_missing_is_left_out_and_its_tensors_are_no_surprise(tmp_path, monkeypatch):
    import transformers

    built = transformers.AutoModel.from_config

    def unless_vision(config, *arguments, **others):
        if "Vision" in type(config).__name__:
            raise ImportError("requires a library of images")
        return built(config, *arguments, **others)

    monkeypatch.setattr(transformers.AutoModel, "from_config", unless_vision)
    folder = write_small(WITH_A_PACKAGE, tmp_path / "ck")
    weights = load_file(folder / "model.safetensors")
    tower = {"model.vision_tower.timm_model.conv_stem.conv.weight": np.ones((4, 3, 3, 3), np.float32)}
    save_file({**weights, **tower}, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder, text_only=True)
    model = load_model(checkpoint)
    assert list(absent_parts(model)) == ["model.vision_tower"]
    assert "requires a library of images" in absent_parts(model)["model.vision_tower"]
    with refused("E-MODEL-BUILD-PACKAGE", UnsupportedModel):
        model.model.vision_tower(torch.zeros(1))
    notes = unused_notes(checkpoint, ())
    assert any("not built here" in note and "vision_tower" in note for note in notes)
    save_file({**weights, **tower, "model.language_model.extra": np.ones(3, np.float32)}, folder / "model.safetensors",
              metadata={"format": "pt"})
    with refused("E-CKPT-TENSORS-UNUSED", InvalidCheckpoint) as refusal:
        unused_notes(open_checkpoint(folder, text_only=True), ())
    assert "model.language_model.extra" in refusal.error.what


def test_a_text_model_whose_package_is_missing_is_refused(monkeypatch):
    import transformers

    def never(config, *_, **__):
        raise ImportError("requires everything")

    monkeypatch.setattr(transformers.AutoModel, "from_config", never)
    config = small_config(MULTIMODAL)
    with refused("E-MODEL-BUILD-PACKAGE", UnsupportedModel), torch.device("meta"), building(config):
        transformers.AutoModelForCausalLM.from_config(config)
    with without_absent_parts(config):
        pass
    assert transformers.AutoModel.from_config is never


def test_the_adapter_of_the_default_language_is_applied_and_no_other(tmp_path):
    folder = write_small("xmod", tmp_path / "ck", default_language="de_DE")
    bundle = gqa.export(folder, tmp_path / "bundle", target="portable", capacity=64)
    graph = (tmp_path / "bundle" / "model.onnx").read_bytes()
    assert b"adapter_modules.de_DE" in graph
    assert b"adapter_modules.en_XX" not in graph
    assert bundle.validate(folder).passed


@pytest.mark.parametrize(("name", "code", "words"), [
    ("openai-gpt", "E-MODEL-OWN-ATTENTION", ("Attention computes attention", "does not keep keys and values")),
    ("git", "E-MODEL-OWN-ATTENTION", ("GitSelfAttention computes attention",)),
    ("xlm", "E-MODEL-DATA-DEPENDENT", ("assert lengths.max().item() <= slen", "modeling_xlm.py")),
    ("blt", "E-MODEL-DATA-DEPENDENT", ("prediction_entropies", "modeling_blt.py")),
    ("zamba", "E-MODEL-STATE-PATH", ("several recurrences of a layer share one state",)),
])
def test_a_refusal_names_what_the_models_own_code_does(name, code, words):
    with refused(code, UnsupportedModel) as refusal:
        probe(small_config(name))
    assert all(word in refusal.error.what for word in words), refusal.error.what
