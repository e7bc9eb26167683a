"""Engines of quantized bundles: TensorRT for RTX builds them, and their sizes show that the bits are kept."""

from __future__ import annotations

import pytest
from gqa_models import write_tiny

from gqa_export.bundle.engine_facts import ENGINE
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx

from .built import build

SIZES = {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 512}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["native", "plugin"])
def test_an_engine_keeps_four_bits(rtx, tmp_path, attention: str) -> None:
    checkpoint = write_tiny("llama_tied", tmp_path / "checkpoint", **SIZES)
    size, weights = {}, {}
    for method in ("keep", "int4"):
        done = export_onnx(checkpoint, tmp_path / method, ExportOptions(
            target=f"trt-{attention}", dtype="fp16", capacity=64, quantize=method, head="same"))
        weights[method] = done.manifest.bytes_copied
        built = build(tmp_path / method, tmp_path / f"{method}-engine", capabilities=("8.9",))
        size[method] = (built.folder / ENGINE).stat().st_size
    assert weights["int4"] < 0.3 * weights["keep"]
    # what is not weights is the same code: the engine shrinks by nearly what the weights do
    assert size["keep"] - size["int4"] > 0.8 * (weights["keep"] - weights["int4"])
