"""Tiny quantized checkpoints, written from the published layout of their format, and what their weights are.

A format is a function (generator, rows, columns) -> (tensors by what follows the module's name, the weight's values in
float64). Nothing here is shared with the readers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gqa_models
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.unused_tensors import unused_notes
from gqa_export.weights.dtypes import numpy_dtype

Encoded = tuple[dict[str, torch.Tensor], np.ndarray]
Encode = Callable[[np.random.Generator, int, int], Encoded]
KEPT = ("embed_tokens", "norm", "lm_head", "router")
"""modules that stay plain"""


def write_quantized(folder: Path, entry: dict[str, Any], encode: Encode, *, keep: tuple[str, ...] = KEPT,
                    beside: str = "", **config: Any) -> dict[str, np.ndarray]:
    """A tiny llama of two layers in a format; gives the values of its quantized weights by name.

    entry: of config.json, or of the file `beside`. keep: parts of names of weights that stay plain.
    """
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 72, **config}
    gqa_models.write_tiny("llama", folder, **sizes)
    tensors, values, rng = load_file(folder / "model.safetensors"), {}, np.random.default_rng(5)
    for name in sorted(tensors):
        if tensors[name].ndim != 2 or any(part in name for part in keep):
            continue
        rows, columns = tensors.pop(name).shape
        parts, values[name] = encode(rng, rows, columns)
        tensors.update({name.removesuffix(".weight") + suffix: part for suffix, part in parts.items()})
    save(folder, tensors)
    if beside:
        (folder / beside).write_text(json.dumps(entry))
    else:
        edit(folder, quantization_config=entry)
    return values


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})


def change(folder: Path, do: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The checkpoint with its tensors changed by `do`, in place."""
    tensors = load_file(folder / "model.safetensors")
    do(tensors)
    save(folder, tensors)
    return folder


def first(tensors: dict[str, torch.Tensor], end: str) -> str:
    """The first name that ends so."""
    return next(name for name in sorted(tensors) if name.endswith(end))


def check(folder: Path, values: dict[str, np.ndarray], **exactly: float) -> dict[str, Any]:
    """That a checkpoint's quantized weights have these values, whole and in stripes, and that its model is loaded with
    them; gives the matrices. exactly: rtol, where rounding is part of the format."""
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.quantized) == set(values)
    assert unused_notes(checkpoint, ()) == ()
    state = load_model(checkpoint, "fp64").state_dict()
    single = load_model(checkpoint).state_dict()
    for name, expected in values.items():
        matrix = checkpoint.quantized[name]
        np.testing.assert_allclose(matrix.parameter(), expected, rtol=exactly.get("rtol", 1e-15), atol=0, err_msg=name)
        middle = matrix.rows // 2 + 1
        np.testing.assert_array_equal(np.concatenate([matrix.dequantize(0, middle), matrix.dequantize(middle)]),
                                      matrix.dequantize(), err_msg=name)
        np.testing.assert_array_equal(state[name].numpy(), matrix.parameter(), err_msg=name)
        np.testing.assert_array_equal(single[name].numpy(), matrix.parameter().astype(np.float32), err_msg=name)
        assert set(matrix.tensors) <= set(checkpoint.packed)
        scale = matrix.stripe().scale
        assert np.array_equal(scale, scale.astype(numpy_dtype(matrix.scale_dtype)).astype(np.float32))
    return checkpoint.quantized


def codes_of(rng: np.random.Generator, rows: int, columns: int, bits: int) -> np.ndarray:
    """Codes around the middle of their range, with both ends, as those of weights are."""
    half = 1 << bits - 1
    found = np.clip(np.rint(rng.normal(half, half / 3, (rows, columns))), 0, 2 * half - 1).astype(np.int64)
    found[0, :2] = 0, 2 * half - 1
    return found


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Rows of codes in words of 32 bits, the first in the lowest bits, whole codes only."""
    each = 32 // bits
    rows = np.zeros((len(codes), -(-codes.shape[1] // each) * each), np.uint64)
    rows[:, : codes.shape[1]] = codes
    shifted = rows.reshape(len(codes), -1, each) << (np.arange(each, dtype=np.uint64) * np.uint64(bits))
    return torch.from_numpy(shifted.sum(axis=2).astype(np.uint32).view(np.int32))


def spread(scales: np.ndarray, group: int, columns: int) -> np.ndarray:
    """Scales [rows, groups] for every column, in float64."""
    return np.repeat(scales.astype(np.float64), group, axis=1)[:, :columns]


def halves(rng: np.random.Generator, *shape: int,
           dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, np.ndarray]:
    """Random scales in a type, and their values."""
    made = torch.from_numpy(rng.uniform(.002, .02, shape)).to(dtype)
    return made, made.double().numpy()
