"""Tensors that a checkpoint stores and its model does not use: refused by name, noted where they carry nothing."""

from __future__ import annotations

import json

import gqa_models
import numpy as np
import pytest
from refusal import refused
from safetensors.numpy import load_file, save_file

import gqa_export as gqa
from gqa_export.errors import InvalidCheckpoint, UnsupportedModel

from .test_open import edit_config, shard

CODE = "E-CKPT-TENSORS-UNUSED"
BIAS = "model.layers.0.self_attn.q_proj.bias"


def tiny(folder, name="llama"):
    return gqa_models.write_tiny(name, folder / "ck", num_hidden_layers=2)


def add(folder, **shapes):
    """Store further tensors of these shapes in a checkpoint."""
    path = folder / "model.safetensors"
    extra = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})
    return folder


def notes_of(folder, out, **options):
    bundle = gqa.export(folder, out, capacity=64, **options)
    return [note for note in bundle.exported.notes if note.startswith("not used")]


def refuse(folder, out, *names, kind=InvalidCheckpoint, code=CODE, **options):
    with refused(code, kind) as refusal:
        gqa.export(folder, out, capacity=64, **options)
    for name in names:
        assert name in refusal.error.what
    assert not out.exists()


def test_a_bias_that_the_config_does_not_know_is_refused_though_nothing_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("gqa_export.exporting.weight_store.load_model", None)  # weights are streamed
    folder = add(tiny(tmp_path), **{BIAS: 64})
    refuse(folder, tmp_path / "out", BIAS)
    refuse(folder, tmp_path / "out", BIAS)  # the trace was kept this time
    with refused(CODE):
        gqa.plan_export(folder, capacity=64)


def test_ignore_unused_exports_the_same_graph_and_lists_what_is_not_used(tmp_path):
    plain = tiny(tmp_path)
    gqa.export(plain, tmp_path / "plain", capacity=64)
    folder = add(plain, **{BIAS: 64, BIAS.replace("0", "1"): 64, "extra.weight": 3})
    notes = notes_of(folder, tmp_path / "out", ignore_unused=True)
    assert len(notes) == 1
    assert "model.layers.*.self_attn.q_proj.bias (2)" in notes[0]
    assert "extra.weight" in notes[0]
    assert (tmp_path / "out/model.onnx").read_bytes() == (tmp_path / "plain/model.onnx").read_bytes()
    plan = gqa.plan_export(folder, capacity=64, ignore_unused=True)
    assert any("extra.weight" in line for line in plan.lines())


@pytest.mark.parametrize("name", ["model.layers.2.input_layernorm.weight", "embed_tokens.weight"])
def test_a_layer_too_many_and_a_second_name_of_one_weight_are_refused(tmp_path, name):
    refuse(add(tiny(tmp_path), **{name: (8, 8)}), tmp_path / "out", name)


def test_a_complete_checkpoint_does_not_need_a_look_at_the_model(tmp_path, monkeypatch):
    folder = tiny(tmp_path)
    monkeypatch.setattr("gqa_export.checkpoint.unused_tensors.load_skeleton", None)
    assert notes_of(folder, tmp_path / "out") == []


def test_rotary_frequencies_of_old_checkpoints_are_noted(tmp_path):
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    notes = notes_of(add(tiny(tmp_path), **dict.fromkeys(names, 8)), tmp_path / "out")
    assert notes == ["not used, rotary frequencies: model.layers.*.self_attn.rotary_emb.inv_freq (2)"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_mask_buffers_are_noted(tmp_path, name):
    masks = {"transformer.h.0.attn.bias": (1, 1, 16, 16), "h.1.attn.masked_bias": ()}
    assert len(notes_of(add(tiny(tmp_path, name), **masks), tmp_path / "out")) == 2


def test_a_bias_under_the_name_of_a_mask_is_refused(tmp_path):
    refuse(add(tiny(tmp_path), **{"model.layers.0.attn.bias": 64}), tmp_path / "out", "model.layers.0.attn.bias")


def test_merged_experts_are_used_and_what_is_beside_them_is_refused(tmp_path):
    folder = tiny(tmp_path, "mixtral")
    assert notes_of(folder, tmp_path / "out") == []
    name = "model.layers.0.block_sparse_moe.experts.0.w1.bias"
    stored = load_file(folder / "model.safetensors")
    assert name.replace("bias", "weight") in stored, "the checkpoint has its experts one by one"
    refuse(add(folder, **{name: 8}), tmp_path / "refused", name)


def test_a_tied_head_stored_twice_is_used(tmp_path):
    folder = tiny(tmp_path, "llama_tied")
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"]}, folder / "model.safetensors",
              metadata={"format": "pt"})
    assert notes_of(folder, tmp_path / "out") == []


def test_a_tensor_that_the_index_of_the_shards_does_not_list_is_not_overlooked(tmp_path):
    folder = shard(add(tiny(tmp_path), **{BIAS: 64}))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][BIAS]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(folder, tmp_path / "out", BIAS)


def test_pickled_tensors_are_looked_at_too(tmp_path):
    import torch

    folder = add(tiny(tmp_path), **{BIAS: 64})
    tensors = {name: torch.from_numpy(value) for name, value in load_file(folder / "model.safetensors").items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refuse(folder, tmp_path / "out", BIAS, allow_pickle=True)


def multimodal(folder):
    """A tiny Gemma 3 with its image encoder."""
    import transformers
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 128,
            "sliding_window": 16, "bos_token_id": 2, "pad_token_id": 0, "eos_token_id": [5, 6]}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90,
                          boi_token_index=91, eoi_token_index=92)
    transformers.set_seed(0)
    Gemma3ForConditionalGeneration(config).eval().save_pretrained(folder)
    return folder


def test_the_image_encoder_of_a_text_only_export_is_not_unexpected(tmp_path):
    folder = multimodal(tmp_path / "ck")
    assert any("vision" in name for name in load_file(folder / "model.safetensors"))
    assert notes_of(folder, tmp_path / "out", text_only=True) == []
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if name.endswith("layers.0.self_attn.q_proj.weight") and "vision" not in name)
    bias = name.replace("weight", "bias")
    refuse(add(folder, **{bias: 32}), tmp_path / "refused", bias, text_only=True)


def test_a_model_in_memory_with_a_bias_too_many_is_refused_and_nothing_opens_it(tmp_path):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny(tmp_path))
    model.get_submodule(BIAS.removesuffix(".bias")).bias = torch.nn.Parameter(torch.ones(64))
    for ignore in (False, True):  # the model uses it
        refuse(model, tmp_path / "out", BIAS, kind=UnsupportedModel, code="E-MODEL-STRUCTURE", ignore_unused=ignore)


def test_the_config_that_knows_the_bias_takes_it(tmp_path):
    folder = tiny(tmp_path)
    stored = load_file(folder / "model.safetensors")
    biases = {name.replace("weight", "bias"): value.shape[0] for name, value in stored.items()
              if ".self_attn." in name and name.endswith("proj.weight")}
    edit_config(add(folder, **biases), attention_bias=True)
    assert notes_of(folder, tmp_path / "out") == []


def test_the_end_tokens_of_a_text_only_export_are_in_its_manifest(tmp_path):
    folder = multimodal(tmp_path / "ck")
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert gqa.export(folder, tmp_path / "out", capacity=64, text_only=True).manifest.tokens["eos"] == [5, 6]
