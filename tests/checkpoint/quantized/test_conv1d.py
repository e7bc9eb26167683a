"""GPT-2's matrices lie the other way round than their codes: never told by a shape, since one of them is square."""

from __future__ import annotations

from pathlib import Path

import gqa_models
import numpy as np
import pytest
import torch
from quantized_checkpoints import Encode, edit, save
from refusal import refused
from safetensors.torch import load_file

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import UnsupportedModel
from gqa_export.weights.rows import rows_of
from gqa_export.weights.source_kinds import DequantizedSource

from .test_compressed_tensors import entry as compressed
from .test_compressed_tensors import packed
from .test_gptq_awq import entry, gptq
from .test_other_formats import BNB, bnb


def write_gpt2(folder: Path, fields: dict, encode: Encode, only: str = "") -> dict[str, np.ndarray]:
    """A tiny GPT-2 whose matrices are quantized as `[out, in]`; gives them as the model has them, `[in, out]`."""
    gqa_models.write_tiny("gpt2", folder, n_layer=1, n_embd=64, n_head=4, vocab_size=72)
    tensors, values, rng = load_file(folder / "model.safetensors"), {}, np.random.default_rng(5)
    for name in sorted(tensors):
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) and only in name:
            columns, rows = tensors.pop(name).shape
            parts, weight = encode(rng, rows, columns)
            values[name] = weight.T
            tensors.update({name.removesuffix(".weight") + tail: part for tail, part in parts.items()})
    save(folder, tensors)
    edit(folder, quantization_config=fields)
    return values


@pytest.mark.parametrize(("fields", "encode", "only"), [
    (entry(), gptq(), ""), (entry(), gptq(), "attn.c_proj"), (BNB, bnb(), "")])
def test_codes_of_gpt2_are_turned_to_its_parameters(tmp_path: Path, fields: dict, encode: Encode, only: str) -> None:
    values = write_gpt2(tmp_path, fields, encode, only)
    checkpoint = open_checkpoint(tmp_path)
    state = load_model(checkpoint, "fp64").state_dict()
    assert set(values) == set(checkpoint.quantized)
    for name, expected in values.items():
        found = state[name if name in state else f"transformer.{name}"]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-15)
        source = DequantizedSource(checkpoint.quantized[name])
        assert source.shape == expected.shape
        np.testing.assert_array_equal(rows_of(source)(1, 7), expected[1:7].astype(np.float32))


def test_a_format_that_may_have_them_either_way_round_is_refused(tmp_path: Path) -> None:
    write_gpt2(tmp_path, compressed("pack-quantized"), packed(4, dtype=torch.float16), "attn.c_proj")
    with refused("E-MODEL-QUANTIZED", UnsupportedModel) as refusal:
        open_checkpoint(tmp_path)
    assert "c_proj.weight is a Conv1D" in refusal.error.what
