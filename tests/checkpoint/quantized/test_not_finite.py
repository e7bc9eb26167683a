"""Scales, minima and codes that are not finite numbers: refused wherever a quantized weight is read, by their place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import case, tensors_of, write_case
from quantized_checkpoints import change, first, write_quantized
from refusal import refused

from gqa_export.checkpoint.gguf_parts import read_gguf
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.quantized.values import values_of
from gqa_export.errors import InvalidCheckpoint
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx

from . import test_compressed_tensors as compressed
from . import test_gptq_awq as gptq_awq
from . import test_other_formats as others

CODE = "E-CKPT-QUANT-NAN"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
HALVES = {"dtype": torch.float16}


def put(end: str, value: float, place: tuple[int, ...] = (1, 0)) -> Callable[[dict[str, torch.Tensor]], None]:
    def do(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[first(tensors, end)]
        tensor[place[: tensor.ndim]] = value
    return do


def no_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors, "up_proj.weight")].view(torch.uint8)[3, 5] = 0xff


@pytest.mark.parametrize(("entry", "encode", "do", "tensor", "said"), [
    (compressed.entry("pack-quantized"), compressed.packed(4), put("up_proj.weight_scale", np.nan, (2, 1)),
     "up_proj.weight_scale", "row 2, columns 32 to 63"),
    (gptq_awq.entry(), gptq_awq.gptq(), put("up_proj.scales", np.inf), "up_proj.scales", "is inf"),
    (AWQ, gptq_awq.awq(32), put("up_proj.scales", -np.inf), "up_proj.scales", "is -inf"),
    (others.fp8(32, 32), others.fp8_blocks(32, 32), put("up_proj.weight_scale_inv", np.nan),
     "up_proj.weight_scale_inv", "row 32, columns 0 to 31"),
    (others.fp8(32, 32), others.fp8_blocks(32, 32), no_number, "up_proj.weight", "code of row 3, column 5"),
    (others.BNB, others.bnb(), put("up_proj.weight.absmax", np.nan, (0,)), "up_proj.weight.absmax", "row 0")])
def test_a_number_that_is_not_finite_is_refused_where_it_is(tmp_path: Path, entry: Any, encode: Any, do: Any,
                                                            tensor: str, said: str) -> None:
    write_quantized(tmp_path, entry, encode, num_hidden_layers=1)
    checkpoint = open_checkpoint(change(tmp_path, do))
    with refused(CODE, InvalidCheckpoint) as caught:
        values_of(checkpoint, "float32")
    name = f"model.layers.0.mlp.{tensor}"
    assert f"tensor {name}" in caught.error.where.split(" or ")[0]
    assert caught.error.where.startswith("module model.layers.0.mlp.up_proj,")
    assert said in caught.error.what


def test_scales_of_zero_and_below_are_numbers(tmp_path: Path) -> None:
    write_quantized(tmp_path, compressed.entry("pack-quantized"), compressed.packed(4), num_hidden_layers=1)
    for value in (0.0, -0.5):
        checkpoint = open_checkpoint(change(tmp_path, put("up_proj.weight_scale", value)))
        assert np.isfinite(values_of(checkpoint, "float32")["model.layers.0.mlp.up_proj.weight"]).all()


@pytest.mark.parametrize("options", [{}, {"weights": "link"}, {"quantize": "dequantize"}, {"quantize": "int4"}],
                         ids=lambda options: " ".join(options.values()) or "keep")
def test_no_export_has_them_and_nothing_is_left(tmp_path: Path, options: dict[str, Any]) -> None:
    """Of a link too, whose scales lie in the checkpoint's own file and are not read for the bundle."""
    write_quantized(tmp_path / "source", compressed.entry("pack-quantized", num_bits=4, group_size=32),
                    compressed.packed(4, 32, **HALVES), num_hidden_layers=1, intermediate_size=128)
    change(tmp_path / "source", put("up_proj.weight_scale", np.nan))
    with refused(CODE, InvalidCheckpoint):
        export_onnx(tmp_path / "source", tmp_path / "out", ExportOptions(dtype="fp32", capacity=32, **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stored", "at", "part"), [("Q8_0", 0, "scale"), ("Q4_1", 2, "minimum")])
def test_a_gguf_file_with_one_names_its_tensor(tmp_path: Path, stored: str, at: int, part: str) -> None:
    architecture, keys, _ = case("llama")
    keys = {**keys, "feed_forward_length": 128}
    path = write_case(tmp_path / "model.gguf", "llama", keys, tensors_of(architecture, keys, {}),
                      stored=gguf.GGMLQuantizationType[stored])
    _, offset = read_gguf(path).places["blk.0.ffn_up.weight"]
    with path.open("r+b") as file:
        file.seek(offset + at)
        file.write(np.float16(np.nan).tobytes())
    with refused(CODE, InvalidCheckpoint) as caught:
        export_onnx(path, tmp_path / "out", ExportOptions(capacity=32))
    assert f"the {part} of row 0" in caught.error.what
    assert "blk.0.ffn_up.weight" in caught.error.where
    assert not (tmp_path / "out").exists()
