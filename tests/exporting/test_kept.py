"""Quantized checkpoints of every family of formats are exported with their codes: the graph computes what the
dequantized weights compute, and the manifest says how each matrix is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnxruntime
import pytest
from checkpoint.quantized import test_compressed_tensors as compressed
from checkpoint.quantized import test_gptq_awq as gptq_awq
from checkpoint.quantized import test_other_formats as others
from gguf_models import CASES, case, tensors_of, write_case
from quantized_checkpoints import write_quantized
from refusal import refused

from gqa_export.bundle.quantization import PLAIN
from gqa_export.errors import UnsupportedModel
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.validation.reference import open_reference
from gqa_export.validation.validate import validate

TOKENS = np.array([[1, 5, 7, 2, 9, 30, 4, 11]], np.int64)
GPTQ = gptq_awq.gptq
FORMATS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "gptq": (gptq_awq.entry(), GPTQ(), "MatMulNBits"),
    "gptq of 3 bits with zero points": (gptq_awq.entry(3, sym=False), GPTQ(3, symmetric=False), "MatMulNBits"),
    "gptq in order of importance": (gptq_awq.entry(8, sym=False), GPTQ(8, symmetric=False, order=True), "MatMulNBits"),
    "gptq of one group": (gptq_awq.entry(4, -1), GPTQ(4, -1), "MatMulNBits"),
    "gptq of 40": (gptq_awq.entry(4, 40), GPTQ(4, 40), PLAIN),
    "fp8": (others.fp8(32, 32), others.fp8_blocks(32, 32), PLAIN),
    "nf4": (others.BNB, others.bnb(), "MatMulBnb4"),
    "nested fp4 of 32": (others.BNB, others.bnb("fp4", 32, True), "MatMulBnb4"),
}


def logits(folder: Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    feeds = {each.name: np.zeros([1, each.shape[1], 0, each.shape[3]], np.float32) for each in session.get_inputs()[2:]}
    return session.run(["logits"], {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS), **feeds})[0]


def both(source: Path, folder: Path, target: str = "ort") -> Any:
    """The manifest of an export that keeps codes, after a comparison with one that does not."""
    options = {"target": target, "dtype": "fp32", "capacity": 32}
    kept = export_onnx(source, folder / "kept", ExportOptions(**options, activations="exact"))
    plain = export_onnx(source, folder / "plain", ExportOptions(**options, quantize="dequantize"))
    got, wanted = logits(folder / "kept"), logits(folder / "plain")
    # of fp32 sums in another order, through two layers
    assert np.abs(got - wanted).max() < 2e-5 * np.abs(wanted).max()
    assert np.abs(wanted).max() > 0
    assert plain.manifest.quantization is not None
    assert plain.manifest.quantization.method == "dequantize"
    return kept.manifest


def test_what_is_kept_rounds_inputs_on_a_cpu_unless_exact_ones_are_wanted(tmp_path):
    source = tmp_path / "source"
    write_quantized(source, *FORMATS["gptq"][:2])
    for activations, found in (("", "int8"), ("exact", "exact")):
        done = export_onnx(source, tmp_path / found, ExportOptions(dtype="fp32", capacity=32, activations=activations))
        assert done.manifest.quantization.activations == found


def test_over_ranks_codes_are_refused_and_their_values_are_cut_and_equal_pytorch(tmp_path):
    source = tmp_path / "source"
    write_quantized(source, *FORMATS["gptq"][:2])
    options = {"target": "trt-native", "dtype": "fp32", "capacity": 32, "tensor_parallel": 2}
    with refused("E-MODEL-QUANTIZED-RANKS", UnsupportedModel):
        export_onnx(source, tmp_path / "out", ExportOptions(**options))
    assert not (tmp_path / "out").exists()
    export_onnx(source, tmp_path / "out", ExportOptions(**options, quantize="dequantize"))
    verdict = validate(tmp_path / "out", source, steps=4)
    assert verdict.passed, verdict.first


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize("form", FORMATS)
def test_codes_are_kept(form: str, target: str, tmp_path: Path) -> None:
    entry, encode, operator = FORMATS[form]
    values = write_quantized(tmp_path / "checkpoint", entry, encode, intermediate_size=128)
    quantization = both(tmp_path / "checkpoint", tmp_path, target).quantization
    assert quantization.method == "keep"
    assert quantization.activations == "exact"
    found = {each.name: each for each in quantization.weights}
    assert set(values) < set(found)
    if target == "onnx":
        operator = PLAIN if operator in (PLAIN, "MatMulBnb4") else "DequantizeLinear"
    for name in values:
        assert found[name].operator == operator, found[name]
        assert found[name].lossless
        assert bool(found[name].reason) == (operator == PLAIN)


@pytest.mark.parametrize(("form", "target", "dtype", "lossless"), [
    ("gptq", "ort", "fp16", True), ("gptq", "ort", "bf16", False), ("gptq", "onnx", "fp16", False),
    ("gptq of 3 bits with zero points", "ort", "fp16", True), ("fp8", "ort", "bf16", False)])
def test_what_fp16_and_bf16_round_is_not_called_lossless(form: str, target: str, dtype: str, lossless: bool,
                                                         tmp_path: Path) -> None:
    """float16 scales are cast in a bf16 graph; DequantizeLinear's products and plain numbers are of the graph's
    format. MatMulNBits of fp16 reads codes, scales and zero points as the checkpoint has them."""
    values = write_quantized(tmp_path / "checkpoint", *FORMATS[form][:2], intermediate_size=128)
    done = export_onnx(tmp_path / "checkpoint", tmp_path / "b", ExportOptions(target=target, dtype=dtype, capacity=32))
    assert {each.lossless for each in done.manifest.quantization.weights if each.name in values} == {lossless}


@pytest.mark.parametrize(("stored", "name"), [("Q4_1", "llama"), ("Q8_0", "llama"), ("Q5_0", "llama"),
                                              ("Q8_0", "gemma")])
def test_a_gguf_file_is_kept_in_its_own_size(tmp_path: Path, stored: str, name: str) -> None:
    """The head of the last is its embedding, of which the file has that name alone."""
    architecture, keys, _ = case(name)
    keys = {**keys, "feed_forward_length": 128}
    path = write_case(tmp_path / "model.gguf", architecture, keys, tensors_of(architecture, keys, CASES[name][2]),
                      stored=gguf.GGMLQuantizationType[stored])
    manifest = both(path, tmp_path)
    kept = [each for each in manifest.quantization.weights if each.stored == f"GGUF {stored}"]
    assert kept
    assert all((each.lossless and "MatMulNBits" in each.operator) or "Gather" in each.operator for each in kept)
    bits = {"Q4_1": 5, "Q8_0": 8.5, "Q5_0": 8.5}[stored]
    linear = next(each for each in kept if "mlp.up_proj" in each.name)
    assert linear.bytes * 8 == bits * 128 * keys["embedding_length"]
    open_reference(path, manifest, "float32", [])  # which holds every such statement against the file


def test_compressed_tensors_are_kept(tmp_path: Path) -> None:
    values = write_quantized(tmp_path / "checkpoint", compressed.entry("pack-quantized", num_bits=4, group_size=32),
                             compressed.packed(4, 32))
    manifest = both(tmp_path / "checkpoint", tmp_path)
    assert {each.operator for each in manifest.quantization.weights if each.name in values} == {"MatMulNBits"}
