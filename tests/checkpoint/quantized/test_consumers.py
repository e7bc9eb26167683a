"""What every part of the program sees of a quantized checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import gqa_models
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf_models import case, tensors_of, write_case
from quantized_checkpoints import KEPT, change, edit, first, write_quantized
from refusal import refused
from safetensors.torch import load_file

from gqa_export.checkpoint.content import model_digest
from gqa_export.checkpoint.decided import decided_by_weights
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.unused_tensors import unused_notes
from gqa_export.cli import main
from gqa_export.conversion.options import ConvertOptions, check_options
from gqa_export.describe.examine import stored_in_checkpoint
from gqa_export.describe.stored_matrices import stored_matrices
from gqa_export.errors import InvalidCheckpoint, UnsupportedModel
from gqa_export.uptraining.options import UptrainOptions
from gqa_export.uptraining.uptrain import uptrain

from .test_compressed_tensors import entry, packed

NO_HEAD = tuple(part for part in KEPT if part not in ("lm_head", "embed_tokens"))


def test_codes_are_neither_pooled_nor_trained(tmp_path: Path) -> None:
    write_quantized(tmp_path, entry("pack-quantized"), packed(4))
    checkpoint = open_checkpoint(tmp_path)
    with refused("E-MODEL-QUANTIZED", UnsupportedModel):
        check_options(checkpoint, ConvertOptions(kv_heads="1"))
    with refused("E-MODEL-QUANTIZED", UnsupportedModel):
        uptrain(checkpoint, tmp_path / "out", UptrainOptions(text="book"))


def test_a_digest_and_the_counts_have_the_codes(tmp_path: Path) -> None:
    write_quantized(tmp_path, entry("pack-quantized"), packed(4))
    checkpoint = open_checkpoint(tmp_path)
    elements, nbytes = stored_in_checkpoint(checkpoint)
    assert elements == 2 * 72 * 64 + 5 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert nbytes < (tmp_path / "model.safetensors").stat().st_size < nbytes + 10_000
    before = model_digest(checkpoint)

    def flip(tensors):
        tensors[first(tensors, "up_proj.weight_packed")][0, 0] ^= 1
    assert model_digest(open_checkpoint(change(tmp_path, flip))) != before
    assert model_digest(open_checkpoint(change(tmp_path, flip))) == before


@pytest.mark.parametrize("as_json", [True, False])
def test_inspect_names_every_matrix_with_its_format_bits_and_bytes(tmp_path: Path, as_json: bool) -> None:
    write_quantized(tmp_path, entry("pack-quantized"), packed(4))
    done = CliRunner().invoke(main, ["inspect", str(tmp_path), *(["--json"] if as_json else [])])
    assert done.exit_code == 0, done.output
    stored = load_file(tmp_path / "model.safetensors")
    up = [tensor for name, tensor in stored.items() if ".0.mlp.up_proj." in name]
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in up)
    if not as_json:
        assert f"mlp.up_proj.weight (2 of them): compressed-tensors int4, group 32, 4 bits, 96 x 64, {2 * nbytes:,} " \
            "bytes" in done.stdout
        assert f"  lm_head.weight: float32, 32 bits, 72 x 64, {72 * 64 * 4:,} bytes" in done.stdout
        return
    matrices = {each.pop("name"): each for each in json.loads(done.stdout)["matrices"]}
    assert len(matrices) == 2 * 7 + 2
    assert sum(each["bytes"] for each in matrices.values()) == sum(
        tensor.numel() * tensor.element_size() for name, tensor in stored.items() if "norm" not in name)
    assert matrices["model.layers.0.mlp.up_proj.weight"] == {
        "stored": "compressed-tensors int4, group 32", "bits": 4, "shape": [96, 64], "bytes": nbytes,
        "quantized": True}


def test_inspect_of_a_gguf_file_and_of_a_plain_checkpoint(tmp_path: Path) -> None:
    architecture, keys, _ = case("llama")
    keys = {**keys, "feed_forward_length": 128}
    path = write_case(tmp_path / "model.gguf", "llama", keys, tensors_of(architecture, keys, {}),
                      stored=gguf.GGMLQuantizationType.Q4_0)
    raw = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.weight"
    kind = raw.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions and both of them
    raw[kind] = gguf.GGMLQuantizationType.IQ4_NL  # whose blocks have as many bytes; its codes are held as 8 bits
    path.write_bytes(raw)
    found = {each.name: each for each in stored_matrices(open_checkpoint(path))}
    up = found["model.layers.0.mlp.up_proj.weight"]
    assert (up.stored, up.bits, up.bytes) == ("GGUF IQ4_NL", 4, 128 * keys["embedding_length"] // 32 * 18)
    gqa_models.write_tiny("llama", tmp_path / "plain", num_hidden_layers=1)
    assert stored_matrices(open_checkpoint(tmp_path / "plain")) == ()


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("plain", [True, False])
def test_a_quantized_head_is_tied_if_its_codes_are_the_embeddings(tmp_path: Path, equal: bool, plain: bool) -> None:
    write_quantized(tmp_path, entry("pack-quantized"), packed(4), keep=("norm",))
    edit(tmp_path, tie_word_embeddings=True)

    def head(tensors):
        for name in [name for name in tensors if name.startswith("model.embed_tokens.")]:
            if equal:
                tensors[name.replace("model.embed_tokens", "lm_head")] = tensors[name].clone()
        if plain:
            for name in [name for name in tensors if name.startswith("lm_head.")]:
                tensors.pop(name)
            tensors["lm_head.weight"] = torch.zeros(72, 64)
    assert decided_by_weights(open_checkpoint(change(tmp_path, head))).untied == (plain or not equal)


def test_a_quantized_weight_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path, entry("pack-quantized"), packed(4))

    def another(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.0.mlp.up_proj.")]:
            tensors[name.replace("up_proj", "side_proj")] = tensors[name].clone()
    checkpoint = open_checkpoint(change(tmp_path, another))
    with refused("E-CKPT-TENSORS-UNUSED", InvalidCheckpoint) as refusal:
        unused_notes(checkpoint, ())
    assert "side_proj.weight" in refusal.error.what


def test_a_weight_of_another_shape_than_the_model_needs_is_refused(tmp_path: Path) -> None:
    from gqa_export.checkpoint.load_model import load_model

    write_quantized(tmp_path, entry("pack-quantized"), packed(4))
    edit(tmp_path, intermediate_size=64)
    with refused("E-CKPT-TENSORS-SHAPE", InvalidCheckpoint):
        load_model(open_checkpoint(tmp_path))


def test_opening_reads_headers_and_small_tensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_quantized(tmp_path, entry("pack-quantized"), packed(4))
    whole, reads = np.memmap, []

    def mapped(path, dtype, mode, offset, shape):
        reads.append(int(np.prod(shape)))
        return whole(path, dtype, mode, offset, shape)
    monkeypatch.setattr(np, "memmap", mapped)
    open_checkpoint(tmp_path)
    assert max(reads, default=0) <= 2
