"""Bundles of `--activations same` for tests: a checkpoint with scales of its own inputs, and what someone changed later
in graph, manifest or record of the text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from checkpoint.quantized import test_compressed_tensors as compressed
from checkpoint.quantized import test_other_formats as others
from quantized_checkpoints import change, write_quantized

from gqa_export.bundle.manifest import MANIFEST, MODEL, FileFact, Manifest, read_manifest
from gqa_export.bundle.quantization import QuantizedWeight
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import Export, export_onnx
from gqa_export.files.sha256 import file_sha256
from gqa_export.quantizing.importance import FILE, importance_file, read_importance, read_largest

MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
CT = compressed.entry("float-quantized", type="float", group_size=None, num_bits=8, strategy="channel")
FORMATS = {
    "ModelOpt FP8": (MODELOPT, others.modelopt_fp8(lambda *_: ()), ".input_scale", 448.0),
    "compressed-tensors FP8": (CT, compressed.float8(lambda rows, _: (rows, 1), zero=True), ".input_scale", 448.0),
    "NVFP4 of ModelOpt": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, others.nvfp4,
                          ".input_scale", 2688.0),
    "NVFP4 of compressed-tensors": (compressed.entry("nvfp4-pack-quantized", type="float", group_size=16),
                                    compressed.four_bit_floats(True), ".input_global_scale", 2688.0),
}
"""name -> description, encoding, what the scale of an input is called, the largest input of a scale of 1"""


def static(folder: Path, form: str) -> Path:
    """A checkpoint whose scales of inputs are those of its own inputs, for some tokens, as a quantizer chooses them.
    Matrices that share an input share the scale."""
    entry, encode, suffix, most = FORMATS[form]
    write_quantized(folder, entry, encode, num_hidden_layers=1)
    model = load_model(open_checkpoint(folder), "float32").eval()
    largest: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "proj" in name:
            def keep(_, given, name=name):
                largest[name] = float(given[0].abs().max())
            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(torch.arange(48)[None] % 72)
    change(folder, lambda tensors: tensors.update({
        name: torch.full_like(tensors[name], 1 / value if "global" in suffix else value)
        for name in tensors if name.endswith(suffix)
        for value in [largest[name.removesuffix(suffix)] / most]}))
    return folder


def exported(checkpoint: Path, folder: Path, target: str = "trt-native", dtype: str = "fp32", **options) -> Export:
    return export_onnx(checkpoint, folder, ExportOptions(target=target, dtype=dtype, capacity=48, activations="same",
                                                         **options))


def rounding(export: Export) -> list[QuantizedWeight]:
    assert export.manifest.quantization is not None
    assert export.manifest.quantization.activations == "same"
    return [weight for weight in export.manifest.quantization.weights if weight.inputs]


def largest(verdict, part: str) -> float:
    return max(kind.max_abs for case in verdict.cases if case.part == part for kind in case.kinds
               if kind.kind == "logits")


def changed(bundle: Path, folder: Path, graph: Callable[[onnx.ModelProto], None],
            manifest: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> Path:
    """A bundle whose graph and manifest were changed by someone; its weights are linked."""
    folder.mkdir()
    for file in bundle.iterdir():
        if file.name not in (MODEL, MANIFEST):
            (folder / file.name).hardlink_to(file)
    model = onnx.load(bundle / MODEL, load_external_data=False)
    graph(model)
    onnx.save(model, folder / MODEL)
    found = manifest(read_manifest(bundle))
    fact = FileFact((folder / MODEL).stat().st_size, file_sha256(folder / MODEL))
    (folder / MANIFEST).write_text(replace(found, files={**found.files, MODEL: fact}).to_json())
    return folder


def scaled(factor: float, which: str = "") -> Callable[[onnx.ModelProto], None]:
    """Scales of rounded inputs times a factor."""
    def do(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name.endswith("/input/scale") and which in tensor.name:
                value = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    return do


def dropped(model: onnx.ModelProto) -> None:
    """The input of one product as it is."""
    makers = {node.output[0]: node for node in model.graph.node}
    node = next(node for node in model.graph.node if node.op_type == "MatMul" and "down_proj" in node.name)
    node.input[0] = makers[makers[node.input[0]].input[0]].input[0]


def stated(factor: float) -> Callable[[Manifest], Manifest]:
    """A manifest that says another scale of every input; 0: that they are not rounded."""
    def do(manifest: Manifest) -> Manifest:
        assert manifest.quantization is not None
        weights = tuple(replace(weight, inputs=weight.inputs if factor else "", input_scale=factor * weight.input_scale,
                                inputs_reason=weight.inputs_reason if factor else "there is none")
                        for weight in manifest.quantization.weights)
        return replace(manifest, quantization=replace(manifest.quantization, weights=weights))
    return do


def all_scaled(bundle: Path, folder: Path, factor: float) -> Path:
    """A bundle whose graph, manifest and own record of the text agree on other scales of inputs."""
    data = importance_file(read_importance(bundle),
                           {name: factor * size for name, size in read_largest(bundle).items()})
    fact = FileFact(len(data), hashlib.sha256(data).hexdigest())

    def state(manifest: Manifest) -> Manifest:
        other = stated(factor)(manifest)
        return replace(other, files={**other.files, FILE: fact})

    changed(bundle, folder, scaled(factor), state)
    (folder / FILE).unlink()  # it is linked
    (folder / FILE).write_bytes(data)
    return folder
