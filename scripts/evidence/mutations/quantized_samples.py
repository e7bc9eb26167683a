"""Tiny checkpoints whose bundles have what quantization can get wrong: a last block that is not full, columns sorted by
group, a tokenizer for a calibration text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from gqa_models import write_tiny
from safetensors.torch import load_file, save_file

TEXT = ("The king rode out at dawn, and his people waited for him until the evening. Bread, salt and a little light "
        "were all they had. Why would a river ask the sea for water? Seven ships left; three of them came home. ") * 4
GROUP = 32


def write_odd(folder: Path) -> Path:
    """A llama whose last matrix of a layer has 136 columns, with a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    write_tiny("llama", folder, num_hidden_layers=3, intermediate_size=136)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def write_gptq(folder: Path) -> Path:
    """A llama whose projections are GPTQ of 4 bits, their columns sorted by activation (desc_act)."""
    write_tiny("llama", folder, num_hidden_layers=3)
    path, random = folder / "model.safetensors", np.random.default_rng(5)
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors.pop(name).shape
        codes = random.integers(0, 16, (columns, rows))
        scales = random.uniform(0.01, 0.05, (columns // GROUP, rows)).astype(np.float16)
        zeros = np.full((columns // GROUP, rows), 7)
        prefix = name.removesuffix(".weight")
        tensors[f"{prefix}.qweight"] = torch.from_numpy(_words(codes, 0))
        tensors[f"{prefix}.qzeros"] = torch.from_numpy(_words(zeros, 1))
        tensors[f"{prefix}.scales"] = torch.from_numpy(scales)
        tensors[f"{prefix}.g_idx"] = torch.from_numpy(
            random.permutation(np.arange(columns) // GROUP).astype(np.int32))
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True,
                                     "desc_act": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _words(codes: np.ndarray, axis: int) -> np.ndarray:
    """Eight codes of 4 bits to a word of 32 along an axis, the first in the lowest bits."""
    along = np.moveaxis(codes.astype(np.uint32), axis, 0)
    grouped = along.reshape(-1, 8, *along.shape[1:])
    words = sum(grouped[:, place] << np.uint32(4 * place) for place in range(8))
    return np.ascontiguousarray(np.moveaxis(words, 0, axis)).view(np.int32)
