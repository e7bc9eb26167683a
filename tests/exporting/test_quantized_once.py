"""An export quantizes every row of a matrix once, however many parts of it are written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import gqa_models
import pytest

from gqa_export.bundle.quantization import PLAIN
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.quantized.matrix import QuantizedMatrix


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gqa_models.write_tiny("llama_tied", tmp_path_factory.mktemp("checkpoint") / "llama_tied")


@pytest.mark.parametrize(("target", "method"), [
    ("ort", "int4"), ("onnx", "int8"), ("portable", "int4"), ("trt-native", "int4"), ("trt-native", "nvfp4")])
def test_no_row_is_quantized_twice(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str,
                                   method: str) -> None:
    """Scales beside codes, the zero points of a lookup, columns first: a search for each would cost as much again."""
    rows: Counter[tuple[str, int]] = Counter()
    read = QuantizedMatrix.stripe

    def counted(matrix: QuantizedMatrix, start: int = 0, stop: int | None = None):
        rows.update((matrix.label, row) for row in range(start, matrix.rows if stop is None else stop))
        return read(matrix, start, stop)

    monkeypatch.setattr(QuantizedMatrix, "stripe", counted)
    done = export_onnx(checkpoint, tmp_path / "out", ExportOptions(
        target=target, quantize=method, capacity=64, dtype="fp32" if target in ("ort", "onnx", "portable") else "fp16"))
    quantized = [weight.name for weight in done.manifest.quantization.weights if weight.operator != PLAIN]
    assert {label.split()[0] for label, _ in rows} >= {name for name in quantized if "layers" in name}
    assert set(rows.values()) == {1}, rows.most_common(3)
