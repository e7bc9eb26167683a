"""Engines of quantized bundles: TensorRT for RTX builds them, and their sizes show that the bits are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from gqa_models import write_tiny
from small_text import SENTENCES, byte_tokenizer

from gqa_export.bundle.engine_facts import ENGINE
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.quantizing.importance import FILE

from .built import build

SIZES = {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 512}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama_tied", tmp_path_factory.mktemp("checkpoint") / "llama_tied", **SIZES)


@pytest.fixture(scope="module")
def plain(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """kind of attention -> bytes of the engine with weights of fp16, and of these weights. The code for the other
    capabilities differs by a tenth of a percent of it."""
    known: dict[str, tuple[int, int]] = {}

    def sizes(attention: str) -> tuple[int, int]:
        if attention not in known:
            known[attention] = _sizes(checkpoint, tmp_path_factory.mktemp("plain"), "keep", attention, "8.0")
        return known[attention]

    return sizes


def _sizes(checkpoint: Path, folder: Path, method: str, attention: str, capability: str,
           head: str = "none") -> tuple[int, int]:
    """Bytes of the engine without the plugin's kernels, and of the weights that it is built from."""
    done = export_onnx(checkpoint, folder / "bundle", ExportOptions(
        target=f"trt-{attention}", dtype="fp16", capacity=64, quantize=method, head=head if method != "keep" else ""))
    built = build(folder / "bundle", folder / "engine", capabilities=(round(10 * float(capability)),))
    assert built.facts.compute_capabilities == (round(10 * float(capability)),)
    return (built.folder / ENGINE).stat().st_size - built.facts.build["kernel_bytes"], done.manifest.bytes_copied


@pytest.mark.slow
@pytest.mark.parametrize(("method", "head", "attention", "capability", "part", "shrinks"), [
    ("int4", "same", "native", "8.0", 0.3, 0.85), ("int4", "same", "plugin", "8.0", 0.3, 0.85),
    ("fp8", "int8", "native", "8.9", 0.55, 0.5), ("nvfp4", "none", "native", "12.0", 0.36, 0.7),
    ("nvfp4", "same", "plugin", "12.0", 0.3, 0.7)])
def test_an_engine_keeps_the_bits(rtx, checkpoint: Path, plain, tmp_path: Path, method: str, head: str, attention: str,
                                  capability: str, part: float, shrinks: float) -> None:
    """The engine shrinks by most of what the weights do. Weights of FP8 and FP4 are dequantized by a kernel for each
    matrix and profile: 2 MB of code here, whatever the size of the matrices; a tied head of eight bits is stored twice.
    With eight bits for each of NVFP4's four it would shrink by less than half."""
    size, weights = _sizes(checkpoint, tmp_path, method, attention, capability, head)
    plain_size, plain_weights = plain(attention)
    assert weights < part * plain_weights
    assert plain_size - size > shrinks * (plain_weights - weights)


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer that has a tokenizer."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512}
    folder = write_tiny("llama", tmp_path_factory.mktemp("readable") / "llama", **sizes)
    byte_tokenizer(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dtype", "attention", "capabilities"), [
    ("fp8", "fp16", "native", (89, 120)), ("nvfp4", "bf16", "plugin", (120,))])
def test_products_of_an_engine_read_codes_on_both_sides(rtx, readable: Path, tmp_path: Path, method: str, dtype: str,
                                                        attention: str, capabilities: tuple[int, ...]) -> None:
    """W8A8 and W4A4: the build log lists the types that each layer reads. A head of integers has inputs as they are."""
    text = tmp_path / "text.txt"
    text.write_text("".join(SENTENCES))
    done = export_onnx(readable, tmp_path / "bundle", ExportOptions(
        target=f"trt-{attention}", dtype=dtype, capacity=64, quantize=method, activations="same", calibrate=text))
    rounding = [weight for weight in done.manifest.quantization.weights if weight.inputs]
    assert len(rounding) == 7
    built = build(tmp_path / "bundle", tmp_path / "engine", capabilities=capabilities)
    assert built.facts.build["products_of_codes"] == {"decode": 7, "prefill": 7}
    assert not any("dequantize them first" in note for note in built.notes)
    assert FILE in built.manifest.files  # by which `validate` tells the scales
