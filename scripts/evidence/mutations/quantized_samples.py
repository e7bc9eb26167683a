"""Tiny checkpoints whose bundles have what quantization can get wrong: a last block that is not full, columns sorted by
group, a tokenizer for a calibration text, scales of inputs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gqa_models import write_tiny
from safetensors.torch import load_file, save_file

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint

TEXT = ("The king rode out at dawn, and his people waited for him until the evening. Bread, salt and a little light "
        "were all they had. Why would a river ask the sea for water? Seven ships left; three of them came home. ") * 4
GROUP = 32
MOST = 448.0
"""the largest number of e4m3"""


def write_odd(folder: Path) -> Path:
    """A llama whose last matrix of a layer has 136 columns, with a tokenizer of bytes."""
    write_tiny("llama", folder, num_hidden_layers=3, intermediate_size=136)
    return add_tokenizer(folder)


def add_tokenizer(folder: Path) -> Path:
    """A tokenizer of bytes for a checkpoint."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def write_fp8(folder: Path) -> Path:
    """A llama whose projections are FP8 of ModelOpt, with scales of their own inputs: those of some tokens."""
    write_tiny("llama", folder, num_hidden_layers=2)
    model = load_model(open_checkpoint(folder), "float32").eval()
    largest: dict[str, float] = {}

    def keep(module: torch.nn.Module, given: tuple[torch.Tensor, ...], name: str) -> None:
        largest[name] = float(given[0].abs().max())

    projections = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    for name, module in projections.items():
        module.register_forward_pre_hook(partial(keep, name=name))
    with torch.no_grad():
        model(torch.arange(model.config.vocab_size)[None, :128])
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in projections:
        values = tensors[f"{name}.weight"]
        scale = values.abs().max() / MOST
        tensors[f"{name}.weight"] = (values / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"], tensors[f"{name}.input_scale"] = scale, torch.tensor(largest[name] / MOST)
    save_file(tensors, path, {"format": "pt"})
    return _described(folder, {"quant_method": "modelopt", "quant_algo": "FP8"})


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
    return _described(folder, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": True})


def _described(folder: Path, quantization: dict[str, object]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


def _words(codes: np.ndarray, axis: int) -> np.ndarray:
    """Eight codes of 4 bits to a word of 32 along an axis, the first in the lowest bits."""
    along = np.moveaxis(codes.astype(np.uint32), axis, 0)
    grouped = along.reshape(-1, 8, *along.shape[1:])
    words = sum(grouped[:, place] << np.uint32(4 * place) for place in range(8))
    return np.ascontiguousarray(np.moveaxis(words, 0, axis)).view(np.int32)
