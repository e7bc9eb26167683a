"""Checkpoints of float8 and float4 go to the targets of TensorRT as codes, and those of integers do in every number
format: the graph computes what the codes mean, and what a wrong scale would make of them is seen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import psutil
import pytest
from checkpoint.quantized import test_compressed_tensors as compressed
from checkpoint.quantized import test_gptq_awq as gptq_awq
from checkpoint.quantized import test_other_formats as others
from checkpoint.quantized.test_experts import write_gpt_oss
from quantized_checkpoints import write_quantized

from gqa_export.bundle.quantization import PLAIN
from gqa_export.bundle.source_checkpoint import open_for
from gqa_export.checkpoint.load_model import load_model
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import Export, export_onnx
from gqa_export.validation.sessions import pytorch_sessions
from gqa_export.validation.validate import validate

pytestmark = pytest.mark.whole_model
CT, FLOAT = "compressed-tensors", {"type": "float", "group_size": None, "num_bits": 8}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
FORMATS = {
    "FP8, blocks that do not fill the matrix": (others.fp8(40, 24), others.fp8_blocks(40, 24), "e4m3"),
    "MXFP8": ({"quant_method": "modelopt", "quant_algo": "MXFP8", "group_size": 32}, others.mxfp8, "e4m3"),
    "FP8, one scale": ({"quant_method": "modelopt", "quant_algo": "FP8"}, others.modelopt_fp8(lambda *_: ()), "e4m3"),
    "FP8, a scale a row": (compressed.entry("float-quantized", **FLOAT, strategy="channel"),
                           compressed.float8(lambda rows, _: (rows, 1)), "e4m3"),
    "NVFP4 of ModelOpt": (NVFP4, others.nvfp4, "e2m1"),
    "NVFP4 of compressed-tensors": (compressed.entry("nvfp4-pack-quantized", type="float", group_size=16),
                                    compressed.four_bit_floats(True), "e2m1"),
    "MXFP4": (compressed.entry("mxfp4-pack-quantized", type="float", group_size=32),
              compressed.four_bit_floats(False), "e2m1"),
    "GPTQ with zero points": (gptq_awq.entry(sym=False), gptq_awq.gptq(symmetric=False), "int"),
    "bf16 scales in an fp16 graph": (compressed.entry("pack-quantized"), compressed.packed(4), "int"),
}


def kept(folder: Path, form: str, target: str, dtype: str) -> Export:
    entry, encode, _ = FORMATS[form]
    write_quantized(folder / "checkpoint", entry, encode)
    return export_onnx(folder / "checkpoint", folder / "bundle", ExportOptions(target=target, dtype=dtype, capacity=32))


@pytest.mark.parametrize(("form", "target", "dtype"), [
    ("FP8, blocks that do not fill the matrix", "trt-native", "bf16"), ("FP8, one scale", "trt-plugin", "fp16"),
    ("FP8, a scale a row", "trt-native", "fp16"),
    ("NVFP4 of ModelOpt", "trt-plugin", "bf16"), ("NVFP4 of compressed-tensors", "trt-native", "fp16"),
    ("MXFP4", "trt-native", "bf16"), ("MXFP8", "trt-native", "fp16"), ("GPTQ with zero points", "trt-native", "fp16"),
    ("bf16 scales in an fp16 graph", "trt-plugin", "fp16")])
def test_codes_are_kept_and_the_graph_means_them(tmp_path: Path, form: str, target: str, dtype: str) -> None:
    """The reference has the values of the codes in fp64: they are not rounded to bf16 or fp16 as plain weights are."""
    done = kept(tmp_path, form, target, dtype)
    assert done.manifest.quantization is not None
    held = [each for each in done.manifest.quantization.weights if each.operator != PLAIN]
    assert len(held) == 14
    kind = FORMATS[form][2]
    assert {(each.kind, each.operator) for each in held} == {(kind, "DequantizeLinear")}
    if kind != "int":
        # powers of two cost no digit of bf16, and fp16's range may be too small for them; other scales have too many
        assert {each.lossless for each in held} == {(form, dtype) == ("MXFP4", "bf16")}
        types = {tensor.data_type for tensor in onnx.load(tmp_path / "bundle" / "model.onnx",
                                                          load_external_data=False).graph.initializer}
        assert {"e4m3": onnx.TensorProto.FLOAT8E4M3FN, "e2m1": onnx.TensorProto.FLOAT4E2M1}[kind] in types
    verdict = validate(tmp_path / "bundle", tmp_path / "checkpoint", steps=2)
    assert verdict.passed, verdict.first


def test_stacked_experts_of_gpt_oss_are_kept(tmp_path: Path) -> None:
    values = write_gpt_oss(tmp_path / "checkpoint")
    done = export_onnx(tmp_path / "checkpoint", tmp_path / "bundle",
                       ExportOptions(target="trt-plugin", dtype="bf16", capacity=32))
    assert done.manifest.quantization is not None
    held = {each.name: each for each in done.manifest.quantization.weights}
    for name, value in values.items():
        assert (held[name].kind, held[name].bits, held[name].lossless) == ("e2m1", 4, True)
        assert held[name].bytes == value.size // 2 + 2 * value.size // 32  # scales are powers of two, held in two bytes
    verdict = validate(tmp_path / "bundle", tmp_path / "checkpoint", steps=2)
    assert verdict.passed, verdict.first


def damaged(folder: Path, name: str, change) -> None:
    """Change the bytes of an initializer whose name ends so."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(each for each in model.graph.initializer if each.name.endswith(name))
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    data = np.memmap(folder / place["location"], np.uint8, "r+", int(place["offset"]), int(place["length"]))
    data[:] = change(data.view(dtype).reshape(tuple(tensor.dims))).astype(dtype).reshape(-1).view(np.uint8)
    data.flush()


@pytest.mark.parametrize(("form", "part", "change"), [
    ("NVFP4 of ModelOpt", ".global", lambda scale: 1 / scale),
    ("NVFP4 of ModelOpt", ".scale", lambda scale: scale.T.reshape(scale.shape)),
    ("NVFP4 of ModelOpt", ".scale", lambda scale: np.roll(scale.view(np.uint8), 1, axis=1).view(scale.dtype)),
    ("FP8, blocks that do not fill the matrix", ".scale", lambda scale: scale.T.reshape(scale.shape)),
    ("FP8, a scale a row", ".scale", lambda scale: np.full_like(scale, scale[0]))])
def test_a_wrong_scale_is_seen(tmp_path: Path, form: str, part: str, change) -> None:
    """Inverted, transposed, of the block beside, of the first row for all."""
    kept(tmp_path, form, "trt-native", "fp32")
    damaged(tmp_path / "bundle", part, change)
    assert not validate(tmp_path / "bundle", tmp_path / "checkpoint", steps=2, check_hashes=False).passed


@pytest.mark.parametrize(("dtype", "reference"), [("fp16", "float32"), ("fp32", "float64")])
def test_values_of_kept_codes_take_memory_of_their_own_in_the_fp32_twin(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, reference: str) -> None:
    """12 bytes are free for each number: enough for what shares the memory of a checkpoint (8), too few for values of
    codes in fp64 beside those in fp32. With too little for fp64, the comparison is in fp32 and says so."""
    done = kept(tmp_path, "GPTQ with zero points", "trt-native", dtype)
    opened, notes = open_for(done.manifest, tmp_path / "checkpoint"), list[str]()
    numbers = sum(one.numel() for one in load_model(opened, "float32").parameters())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12 * numbers))
    assert pytorch_sessions(opened, done.manifest, "float32", notes)[2] == reference
    assert any("no room for PyTorch in fp64" in note for note in notes) == (reference == "float32")
