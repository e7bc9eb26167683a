"""`--quantize fp8` and `nvfp4`: what the quantizers lose, what a bundle for TensorRT holds, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gqa_models
import numpy as np
import pytest
from refusal import refused
from small_text import SENTENCES, byte_tokenizer

from gqa_export.bundle.quantization import PLAIN
from gqa_export.errors import UnsupportedModel
from gqa_export.exporting.dry_run import dry_run
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.quantized.matrix import QuantizedMatrix
from gqa_export.quantizing.floats import quantize_floats, quantize_rows
from gqa_export.quantizing.rtn import quantize_matrix
from gqa_export.quantizing.rules import Rule, read_rules
from gqa_export.validation.validate import validate


def quantized(values: np.ndarray, kind: str, block: int = 32, importance: np.ndarray | None = None) -> QuantizedMatrix:
    shape = (len(values), values.shape[1])
    return quantize_floats(lambda start, stop: values[start:stop], shape, kind, block, "x", importance)


def error(values: np.ndarray, matrix: QuantizedMatrix) -> float:
    exact = values.astype(np.float64)
    return float(np.linalg.norm(matrix.dequantize() - exact) / np.linalg.norm(exact))


def nearest(values: np.ndarray, kind: str, block: int) -> float:
    """The error of what others do: the largest number of a block on the kind's largest, every value to the nearest."""
    blocks = values.reshape(-1, block).astype(np.float64)
    from gqa_export.quantized.matrix import LEVELS

    levels = LEVELS[kind][np.isfinite(LEVELS[kind])]
    scale = np.abs(blocks).max(axis=1, keepdims=True) / levels.max()
    found = np.abs((blocks / scale)[..., None] - levels).argmin(-1)
    return float(np.linalg.norm(levels[found] * scale - blocks) / np.linalg.norm(blocks))


VALUES = np.random.default_rng(0).normal(0, 0.02, (64, 256)).astype(np.float32)


@pytest.mark.parametrize(("kind", "block"), [("e4m3", 32), ("e4m3", 256), ("e2m1", 16)])
def test_the_searched_scale_loses_less_than_the_largest_number(kind: str, block: int) -> None:
    """With exact scales even: of NVFP4 ours are numbers of e4m3."""
    assert error(VALUES, quantized(VALUES, kind, block)) < 0.97 * nearest(VALUES, kind, block)


def test_smaller_blocks_lose_less() -> None:
    by_row, by_block = (error(VALUES, quantized(VALUES, "e4m3", block)) for block in (256, 32))
    assert by_block < 0.9 * by_row


def test_integers_of_as_many_bits_lose_no_more() -> None:
    """Of weights alone; NVFP4's blocks are half as large as those of the integers."""
    def integers(bits: int) -> float:
        return error(VALUES, quantize_matrix(lambda start, stop: VALUES[start:stop], VALUES.shape, bits, 32, "x"))

    assert integers(8) < error(VALUES, quantized(VALUES, "e4m3"))
    assert integers(4) < 1.02 * error(VALUES, quantized(VALUES, "e2m1"))


def test_errors_are_weighed() -> None:
    importance = np.linspace(0.01, 10, 256).astype(np.float32)
    plain, weighed = (quantized(VALUES, "e2m1", importance=each).dequantize() for each in (None, importance))

    def cost(found: np.ndarray) -> float:
        return float((importance * (found - VALUES) ** 2).sum())

    assert cost(weighed) < cost(plain)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6, 1e-30])
def test_the_second_scale_takes_any_range_and_is_a_power_of_two(scale: float) -> None:
    values = (VALUES * np.float32(scale)).astype(np.float32)
    matrix = quantized(values, "e2m1")
    assert matrix.global_scale == 2.0 ** round(np.log2(matrix.global_scale))
    assert matrix.stripe().scale.max() <= 448
    assert error(values, matrix) < 0.1


@pytest.mark.parametrize("kind", ["e4m3", "e2m1"])
def test_zeros_stay_zeros_and_numbers_of_the_format_stay_what_they_are(kind: str) -> None:
    from gqa_export.quantized.matrix import LEVELS

    levels = LEVELS[kind][np.isfinite(LEVELS[kind])]
    values = np.random.default_rng(1).choice(levels, (8, 64)).astype(np.float32)
    values[:, ::16] = levels.max()
    values[3] = 0
    assert np.array_equal(quantized(values, kind, 16).dequantize(), values)
    assert not quantized(np.zeros((4, 64), np.float32), kind).dequantize().any()


@pytest.mark.parametrize("kind", ["e4m3", "e2m1"])
@pytest.mark.parametrize(("value", "code"), [(np.nan, "E-MODEL-QUANTIZE-VALUE"), (np.inf, "E-MODEL-QUANTIZE-VALUE")])
def test_values_that_are_not_finite_are_refused(kind: str, value: float, code: str) -> None:
    values = VALUES.copy()
    values[3, 5] = value
    with refused(code, UnsupportedModel):
        quantized(values, kind).dequantize()


def test_a_scale_that_float16_does_not_hold_is_refused_and_a_small_one_is_made_larger() -> None:
    with refused("E-MODEL-QUANTIZE-SCALE", UnsupportedModel):
        quantize_rows(np.full((4, 64), 1e9, np.float32), "e4m3", 32, 1.0, "x")
    assert error(VALUES * np.float32(1e-3), quantized(VALUES * np.float32(1e-3), "e4m3")) < 0.03


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = gqa_models.write_tiny("llama_tied", tmp_path_factory.mktemp("checkpoint") / "llama_tied")
    byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize(("target", "method", "head", "dtype"), [
    ("trt-native", "fp8", "same", "fp32"), ("trt-plugin", "nvfp4", "int8", "bf16"),
    ("trt-native", "nvfp4", "same", "fp16")])
def test_a_bundle_means_what_is_quantized_again(checkpoint: Path, tmp_path: Path, target: str, method: str, head: str,
                                                dtype: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(SENTENCES) * 8)
    calibrate = text if method == "nvfp4" and head == "int8" else None
    done = export_onnx(checkpoint, tmp_path / "b", ExportOptions(target=target, quantize=method, head=head, dtype=dtype,
                                                                 capacity=64, calibrate=calibrate))
    assert done.manifest.quantization is not None
    assert done.manifest.quantization.method == method
    kinds = {each.kind for each in done.manifest.quantization.weights}
    assert kinds == {{"fp8": "e4m3", "nvfp4": "e2m1"}[method], *(["int"] if head == "int8" else [])}
    assert not any(each.lossless or each.operator == PLAIN for each in done.manifest.quantization.weights)
    verdict = validate(tmp_path / "b", checkpoint, steps=2)
    assert verdict.passed, verdict.first


@pytest.mark.parametrize("target", ["ort", "onnx", "portable"])
@pytest.mark.parametrize(("method", "instead"), [("fp8", "int8"), ("nvfp4", "int4")])
def test_other_targets_are_refused_before_anything_is_read(tmp_path: Path, target: str, method: str,
                                                           instead: str) -> None:
    with refused("E-TARGET-CODES") as refusal:
        export_onnx(tmp_path / "no such checkpoint", tmp_path / "b", ExportOptions(target=target, quantize=method))
    assert f"--quantize {instead}" in refusal.error.fix
    assert "--target trt-plugin or trt-native" in refusal.error.fix
    assert not (tmp_path / "b").exists()


def test_a_file_of_rules_names_kinds(checkpoint: Path, tmp_path: Path) -> None:
    rules = tmp_path / "r.toml"
    rules.write_text('[[rule]]\nmatch = "*down_proj*"\nbits = 8\nkind = "e4m3"\n'
                     '[[rule]]\nmatch = "*_proj*"\nbits = 4\nkind = "e2m1"\n[[rule]]\nmatch = "*"\nbits = 8\n')
    assert read_rules(rules)[0] == Rule("*down_proj*", 8, 0, "e4m3")
    plan = dry_run(checkpoint, ExportOptions(target="trt-plugin", quantize=str(rules), capacity=64))
    lines = "\n".join(plan.lines())
    assert "DequantizeLinear, block 32, e4m3" in lines
    assert "DequantizeLinear, block 16, e2m1" in lines
    with refused("E-TARGET-CODES"):
        dry_run(checkpoint, ExportOptions(target="ort", quantize=str(rules), capacity=64))


def test_rounded_inputs_change_the_blocks_of_what_they_are_for_alone(tmp_path: Path) -> None:
    """A product of FP8 has one scale a row, whatever block is named, and a note says so. An embedding that no product
    reads keeps its blocks."""
    byte_tokenizer(gqa_models.write_tiny("llama", tmp_path / "llama", num_hidden_layers=1))
    text = tmp_path / "text.txt"
    text.write_text("".join(SENTENCES))
    plan = dry_run(tmp_path / "llama", ExportOptions(target="trt-native", quantize="fp8", head="same", capacity=64,
                                                     block=16, activations="same", calibrate=text))
    (embedding,) = (line for line in plan.quantization if "embed_tokens" in line)
    (product,) = (line for line in plan.quantization if "k_proj" in line)
    assert "block 16, e4m3, " in embedding
    assert "block 64, e4m3, inputs e4m3" in product
    assert any("have one scale a row: --block" in note for note in plan.notes)


@pytest.mark.parametrize("rule", ['bits = 8\nkind = "e2m1"', 'bits = 4\nkind = "e4m3"', 'bits = 8\nkind = "fp8"',
                                  "bits = 8\nkind = 3"])
def test_a_kind_of_other_bits_is_refused(tmp_path: Path, rule: str) -> None:
    (tmp_path / "r.toml").write_text(f'[[rule]]\nmatch = "*"\n{rule}\n')
    with refused("E-OPTION-QUANTIZE-FILE") as refusal:
        read_rules(tmp_path / "r.toml")
    assert "kind" in refusal.error.what
