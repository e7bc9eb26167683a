"""fp16 that overflows in PyTorch too: still a difference, with the layer and the remedy."""

from __future__ import annotations

import pytest
import torch
from gqa_models import write_tiny
from refusal import refused
from safetensors.torch import load_file, save_file

from gqa_export.errors import EXIT_DIFFERENT, EXIT_PASSED, OutputDiffers
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.report.console import details
from gqa_export.runtime.generate import generate
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.validation.validate import validate

pytestmark = pytest.mark.whole_model


def overflowing(folder, layer: int):
    """A tiny llama in fp16 whose residual stream passes 65504 in one layer; no weight is large."""
    write_tiny("llama", folder, num_hidden_layers=3)
    tensors = load_file(folder / "model.safetensors")
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"model.layers.{layer}.mlp.{name}.weight"] *= 60
    assert max(float(tensor.abs().max()) for tensor in tensors.values()) < 100
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("layer", [0, 2])
def test_an_overflow_that_pytorch_shares_is_named_with_its_layer_and_the_remedy(tmp_path, layer):
    checkpoint = overflowing(tmp_path / "checkpoint", layer)
    export_onnx(checkpoint, tmp_path / "half", ExportOptions(capacity=64, dtype="fp16"))
    verdict = validate(tmp_path / "half", checkpoint, steps=4)
    assert verdict.exit_code == EXIT_DIFFERENT
    words = f"layer {layer} overflows float16, in PyTorch too: --dtype bf16 or fp32"
    assert verdict.overflow == words
    assert f"reason: {words}" in details(verdict)
    assert verdict.to_dict()["overflow"] == words
    with refused("E-VALIDATE-DIFFERS", OutputDiffers) as refusal:
        verdict.check()
    assert words in refusal.error.what
    with refused("E-RUN-NAN") as refusal:
        generate(OrtSession.load(tmp_path / "half", "cpu"), [[5, 6, 7]], 2)
    assert "--dtype bf16 or fp32" in refusal.error.fix

    export_onnx(checkpoint, tmp_path / "whole", ExportOptions(capacity=64, dtype="fp32"))
    verdict = validate(tmp_path / "whole", checkpoint, steps=4)
    assert (verdict.exit_code, verdict.overflow) == (EXIT_PASSED, "")


def test_numbers_that_only_the_bundle_lacks_are_not_called_an_overflow(tmp_path):
    import onnx

    checkpoint = write_tiny("llama", tmp_path / "checkpoint", num_hidden_layers=2)
    export_onnx(checkpoint, tmp_path / "half", ExportOptions(capacity=64, dtype="fp16"))
    session = OrtSession.load(tmp_path / "half", "cpu")
    assert torch.isfinite(torch.from_numpy(session.step([[5]]).logits)).all()
    data = bytearray((tmp_path / "half" / "model.onnx.data").read_bytes())
    model = onnx.load(tmp_path / "half" / "model.onnx", load_external_data=False)
    norm = next(tensor for tensor in model.graph.initializer if "norm" in tensor.name and tensor.external_data)
    place = int(next(entry.value for entry in norm.external_data if entry.key == "offset"))
    data[place: place + 2] = b"\x00\x7c"  # infinity
    (tmp_path / "half" / "model.onnx.data").write_bytes(bytes(data))
    verdict = validate(tmp_path / "half", checkpoint, steps=4, check_hashes=False)
    assert (verdict.exit_code, verdict.overflow) == (EXIT_DIFFERENT, "")
