"""The tiny models: each is a checkpoint that transformers reads back, with nothing trivial left in it."""

from __future__ import annotations

import gqa_models
import pytest

REQUIRED = {
    "llama", "llama_mha", "llama_mqa", "llama_linear", "llama_llama3", "llama_yarn", "llama_dynamic", "mistral",
    "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_bidirectional", "phi3", "gpt_oss", "granite", "cohere", "stablelm",
    "llama4", "phimoe", "bert", "mixtral", "smollm3", "gpt2", "mamba", "t5", "deepseek_v3", "falcon_h1",
}  # fmt: skip


def test_every_family_that_the_tests_need_is_there():
    assert set(gqa_models.tiny_names()) >= REQUIRED


@pytest.mark.parametrize("name", gqa_models.tiny_names())
def test_a_tiny_model_is_small_and_every_parameter_of_it_varies(name, tmp_path):
    from safetensors.torch import load_file

    gqa_models.write_tiny(name, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) < 1_000_000
    constant = [key for key, tensor in tensors.items() if tensor.numel() > 1 and tensor.min() == tensor.max()]
    buffers = {"inv_freq", "e_score_correction_bias"}  # no parameters: computed or zero by definition
    assert [key for key in constant if key.rpartition(".")[2] not in buffers] == []


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path):
    written = [gqa_models.write_tiny("llama", tmp_path / str(n), seed=seed) for n, seed in enumerate((0, 0, 1))]
    first, again, other = [(folder / "model.safetensors").read_bytes() for folder in written]
    assert first == again
    assert first != other


def test_overrides_and_dtype_reach_the_checkpoint(tmp_path):
    import json

    from safetensors.torch import load_file

    gqa_models.write_tiny("gemma2", tmp_path, dtype="bfloat16", num_hidden_layers=6, sliding_window=8)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["sliding_window"], len(config["layer_types"])) == (6, 8, 6)
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "model.safetensors").values()} == {"torch.bfloat16"}


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "gemma2", "gemma3", "gpt_oss", "cohere", "stablelm"])
def test_attention_matters_to_the_logits(name, tmp_path):
    """A token more than two positions back moves the logits by much more than any tolerance of the project."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gqa_models.write_tiny(name, tmp_path)).eval()
    ids = torch.randint(4, 320, (1, 100), generator=torch.Generator().manual_seed(3))
    other = ids.clone()
    other[0, 90] = (ids[0, 90] + 7) % 320
    with torch.no_grad():
        moved = (model(ids).logits - model(other).logits)[0]
    assert moved[:90].abs().max() == 0
    assert moved[99].abs().max() > 0.05
