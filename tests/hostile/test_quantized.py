"""Quantized checkpoints with tensors of other shapes, types and values, and descriptions of nonsense: refused or read,
never an error of another kind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.quantized.test_compressed_tensors import entry as packed_entry
from checkpoint.quantized.test_compressed_tensors import packed
from checkpoint.quantized.test_gptq_awq import awq, entry, gptq
from checkpoint.quantized.test_other_formats import BNB, bnb, fp8, fp8_blocks, int4_awq, nvfp4
from quantized_checkpoints import save, write_quantized
from safetensors.torch import load_file

from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import GqaExportError

FORMATS = {
    "compressed-tensors": (packed_entry("pack-quantized"), packed(4, zeros=True, order=True)),
    "gptq": (entry(sym=False), gptq(symmetric=False, order=True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq()),
    "int4": ({"quant_method": "modelopt", "group_size": 32}, int4_awq(32, True)),
    "nvfp4": ({"quant_method": "modelopt", "group_size": 16}, nvfp4),
    "bitsandbytes": (BNB, bnb(nested=True)),
    "fp8": (fp8(40, 24), fp8_blocks(40, 24, "uint8")),
}
NONSENSE = [None, 0, -1, 1, 3, True, "x", "", [], [1], {}, {"a": 1}, 1e30, 2**70, "32", [32, 32]]
TYPES = [torch.int32, torch.uint8, torch.int8, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int64]


def other_tensor(choose: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with one thing changed."""
    return choose.choice([
        lambda: tensor.reshape(-1), lambda: tensor.reshape(1, *tensor.shape),
        lambda: torch.zeros(0, dtype=tensor.dtype),
        lambda: tensor[: max(1, len(tensor) // 2)] if tensor.ndim else tensor.reshape(1, 1),
        lambda: torch.zeros(tensor.shape, dtype=choose.choice(TYPES)),
        lambda: torch.full(tensor.shape, 255 if tensor.dtype == torch.uint8 else -1).to(tensor.dtype)])()


def change_entry(choose: random.Random, fields: dict[str, Any]) -> None:
    """One field of a description becomes nonsense, at any depth."""
    key = choose.choice(list(fields))
    if isinstance(fields[key], dict) and fields[key]:
        change_entry(choose, fields[key])
    elif key != "quant_method":
        fields[key] = choose.choice(NONSENSE)


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_but_refusals(tmp_path: Path, name: str) -> None:
    fields, encode = FORMATS[name]
    write_quantized(tmp_path, fields, encode, num_hidden_layers=1)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    choose, ends = random.Random(name), {"read": 0, "refused": 0}
    for turn in range(24):
        changed, described = dict(tensors), json.loads(json.dumps(config))
        if turn % 2:
            place = choose.choice([key for key in sorted(tensors) if "layers.0" in key])
            changed[place] = other_tensor(choose, tensors[place])
        else:
            change_entry(choose, described["quantization_config"])
        save(tmp_path, changed)
        (tmp_path / "config.json").write_text(json.dumps(described))
        try:
            for matrix in open_checkpoint(tmp_path).quantized.values():
                matrix.dequantize(matrix.rows // 2, matrix.rows)
            ends["read"] += 1
        except GqaExportError:
            ends["refused"] += 1
    assert ends["refused"] >= 5
