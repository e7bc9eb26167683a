"""A bundle with quantized matrix products, made of a plain one of target `onnx` by hand: every product with a
projection's weight becomes a MatMulNBits of 4 bits, and a checkpoint holds what its codes stand for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from gqa_export.bundle.manifest import MANIFEST, MODEL, FileFact, read_manifest
from gqa_export.bundle.quantization import Quantization, QuantizedWeight
from gqa_export.files.sha256 import file_sha256

BLOCK = 16
NODE = "/MatMul_0"
Change = Callable[[dict, dict], None]
"""changes the arrays (codes packed [N, blocks, BLOCK / 2], scales, zeros) and the attributes of a node"""


def rtn(weight_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes 0..15 [N, K], scales fp32 and zero points [N, blocks]: asymmetric, rounded to nearest."""
    blocks = weight_NK.reshape(len(weight_NK), -1, BLOCK).astype(np.float64)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    scale = ((high - low) / 15).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, 15)
    codes = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, 15)
    return codes.reshape(weight_NK.shape).astype(np.uint8), scale, zero.astype(np.uint8)


def dequantized(weight_NK: np.ndarray) -> np.ndarray:
    """What the codes of a weight stand for, fp32."""
    codes, scale, zero = rtn(weight_NK)
    spread = (np.repeat(each.astype(np.float64), BLOCK, 1) for each in (scale, zero))
    return (next(spread) * (codes - next(spread))).astype(np.float32)


def is_projection(name: str) -> bool:
    """Whether a weight of this name is quantized."""
    return name.endswith("_proj.weight")


def quantize_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint whose projections are what 4 bits leave of them."""
    shutil.copytree(checkpoint, folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name in filter(is_projection, weights):
        weights[name] = torch.from_numpy(dequantized(weights[name].numpy()))
    save_file(weights, path, {"format": "pt"})
    return folder


def packed(codes: np.ndarray) -> np.ndarray:
    """[N, K] codes as [N, blocks, BLOCK / 2] bytes, the earlier one in the low bits."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(len(codes), -1, BLOCK // 2)


def packed_zeros(zero: np.ndarray) -> np.ndarray:
    """[N, blocks] zero points as bytes, each row padded to whole ones."""
    even = np.pad(zero, ((0, 0), (0, zero.shape[1] % 2)))
    return even[:, 0::2] | even[:, 1::2] << 4


def quantize_bundle(bundle: Path, checkpoint: Path, folder: Path, *, level: int = 4, stated: str = "",
                    change: Change | None = None) -> Path:
    """A copy of a bundle of target `onnx` whose projections are MatMulNBits.

    Args:
        bundle: of `checkpoint`, which is not quantized. level: accuracy level of every node.
        stated: what the manifest says of activations; "" is what the level means.
        change: what goes wrong with the first node, of a layer's `down_proj`.
    """
    shutil.copytree(bundle, folder)
    manifest, model = read_manifest(folder), onnx.load(str(folder / MODEL), load_external_data=False)
    weights, graph, stored = load_file(checkpoint / "model.safetensors"), model.graph, []
    for place, node in enumerate(list(graph.node)):
        name = node.name.removesuffix(NODE) + ".weight"
        if node.op_type != "MatMul" or not is_projection(name):
            continue
        rows, columns = weights[name].shape
        codes, scale, zero = rtn(weights[name].numpy())
        arrays = {"codes": packed(codes), "scales": scale, "zeros": packed_zeros(zero)}
        attributes = {"bits": 4, "block_size": BLOCK, "K": columns, "N": rows, "accuracy_level": level}
        if change is not None and "down_proj" in name:
            change(arrays, attributes)
            change = None
        for kind, array in arrays.items():
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), f"{name}/{kind}"))
        made = onnx.helper.make_node("MatMulNBits", [node.input[0], *(f"{name}/{kind}" for kind in arrays)],
                                     list(node.output), name=node.name, domain="com.microsoft", **attributes)
        graph.node.remove(node)
        graph.node.insert(place, made)
        size = sum(array.nbytes for array in arrays.values())
        stored.append(QuantizedWeight(name, "float32", 4, BLOCK, False, "MatMulNBits", size))
    used = {name for node in graph.node for name in node.input}
    kept = [node for node in graph.node if node.op_type != "Transpose" or used & set(node.output)]
    used = {name for node in kept for name in node.input}
    del graph.node[:]
    graph.node.extend(kept)
    left = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(folder / MODEL))
    quantization = Quantization("keep", stated or ("int8" if level == 4 else "exact"), tuple(stored))
    size = (folder / MODEL).stat().st_size
    files = {**manifest.files, MODEL: FileFact(size, file_sha256(folder / MODEL))}
    (folder / MANIFEST).write_text(replace(manifest, files=files, quantization=quantization).to_json())
    return folder
