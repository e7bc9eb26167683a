"""A head beside `tie_word_embeddings: true`: the stored tensors decide whether it is the embedding."""

from __future__ import annotations

import gqa_models
import pytest
import torch
from refusal import refused
from safetensors.torch import load_file, save_file

import gqa_export as gqa
from gqa_export.errors import InvalidCheckpoint

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def with_head(folder, change, dtype=torch.float32):
    """A tied checkpoint of `dtype` with a head made from the embedding."""
    gqa_models.write_tiny("llama_tied", folder, num_hidden_layers=2)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, HEAD: change(tensors[EMBEDDING])}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("change", [lambda rows: rows.flip(0), lambda rows: rows * (1 + 2**-12)],
                         ids=["other rows", "nearly equal"])
def test_a_head_that_differs_is_a_head_of_its_own(tmp_path, change):
    folder = with_head(tmp_path / "ck", change)
    bundle = gqa.export(folder, tmp_path / "out", capacity=64)
    verdict = bundle.validate(folder)
    assert verdict.passed
    assert bundle.manifest.bytes_copied > sum(t.nbytes for n, t in load_file(folder / "model.safetensors").items()
                                              if n != HEAD)


def test_a_head_nearly_equal_in_another_dtype_is_used_at_its_own_precision(tmp_path):
    folder = with_head(tmp_path / "ck", lambda rows: rows.float() * (1 + 2**-12), torch.bfloat16)
    bundle = gqa.export(folder, tmp_path / "out", capacity=64, dtype="fp32")
    assert bundle.validate(folder).passed
    assert bundle.manifest.bytes_copied >= 4 * sum(t.numel() for t in load_file(folder / "model.safetensors").values())


def test_an_equal_head_is_streamed_and_placed_once(tmp_path, monkeypatch):
    monkeypatch.setattr("gqa_export.exporting.weight_store.load_model", None)
    folder = with_head(tmp_path / "ck", torch.clone)
    plain = gqa_models.write_tiny("llama_tied", tmp_path / "plain", num_hidden_layers=2)
    bundles = [gqa.export(place, tmp_path / f"out-{place.name}", capacity=64) for place in (folder, plain)]
    assert bundles[0].manifest.bytes_copied == bundles[1].manifest.bytes_copied


def test_a_model_in_memory_whose_head_was_untied_is_exported_with_it(tmp_path):
    import transformers

    folder = gqa_models.write_tiny("llama_tied", tmp_path / "ck", num_hidden_layers=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
    assert gqa.export(model, tmp_path / "out", capacity=64).validate(model).passed


def test_a_head_of_another_shape_than_the_embedding_is_refused_with_both_shapes(tmp_path):
    folder = with_head(tmp_path / "ck", lambda rows: torch.cat([rows, rows]))
    with refused("E-CKPT-TENSORS-SHAPE", InvalidCheckpoint) as refusal:
        gqa.export(folder, tmp_path / "out", capacity=64)
    assert HEAD in refusal.error.what
    assert EMBEDDING in refusal.error.what
