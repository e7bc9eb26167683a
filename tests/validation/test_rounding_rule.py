"""PyTorch that rounds the inputs of products as ONNX Runtime does at accuracy level 4, form by form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoint.quantized import test_gptq_awq as gptq_awq
from gguf_models import case, tensors_of, write_case
from gqa_models.shrink import write_small
from quantized_checkpoints import write_quantized
from refusal import refused

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import InvalidBundle
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.validation.accuracy_level import RoundedInput, RoundInputs, rounded, rounded_inputs

TOKENS = np.array([[1, 5, 7, 2, 9, 30, 4, 11]], np.int64)


def of_gguf(kind: str, name: str = "llama", **sizes: int) -> Any:
    """A writer of a GGUF file of this type."""
    def write(folder: Path) -> Path:
        architecture, keys, options = case(name)
        keys = {**keys, "feed_forward_length": 128, **sizes}
        return write_case(folder / "model.gguf", name, keys, tensors_of(architecture, keys, options),
                          stored=gguf.GGMLQuantizationType[kind])
    return write


def of_gptq(bits: int, **options: Any) -> Any:
    """A writer of a GPTQ checkpoint."""
    def write(folder: Path) -> Path:
        write_quantized(folder / "checkpoint", gptq_awq.entry(bits, sym=False),
                        gptq_awq.gptq(bits, symmetric=False, **options), intermediate_size=128)
        return folder / "checkpoint"
    return write


SMALL = {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 32}
FORMS = {"minima": of_gguf("Q4_1"), "symmetric": of_gguf("Q8_0"), "zero points": of_gptq(4),
         "columns in another order": of_gptq(8, order=True),
         "minima of experts, whose inputs have two axes": of_gguf("Q4_1", "qwen2moe", **SMALL)}


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize("form", FORMS)
def test_the_baseline_rounds_as_the_export_does(form: str, target: str, tmp_path: Path) -> None:
    """What a block adds beside its codes is multiplied by sums of inputs that are not rounded. A baseline that rounds
    them too was off by a fourth of what the export was off by, on SmolLM2 and prompts of special tokens."""
    source = FORMS[form](tmp_path)
    export = export_onnx(source, tmp_path / "kept", ExportOptions(target=target, dtype="fp32", capacity=32))
    session = onnxruntime.InferenceSession(tmp_path / "kept" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {each.name: np.zeros([1, each.shape[1], 0, each.shape[3]], np.float32) for each in session.get_inputs()[2:]}
    got = session.run(["logits"], {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS), **feeds})[0]
    checkpoint = open_checkpoint(str(source))
    model = load_model(checkpoint, "float32").eval()
    with torch.no_grad():
        plain = model(torch.from_numpy(TOKENS)).logits.numpy()
        with RoundInputs(rounded_inputs(export.manifest, checkpoint, model)):
            emulated = model(torch.from_numpy(TOKENS)).logits.numpy()
    moved = np.linalg.norm(emulated - plain)
    assert moved > 1e-3 * np.linalg.norm(plain), "nothing was rounded"
    # fp32 sums in another order; a value between two codes may go either way, which moves one of some hundred
    assert np.linalg.norm(got - emulated) < 0.1 * moved


@pytest.mark.parametrize("name", ["nemotron", "gemma2"])
def test_inputs_that_onnx_runtime_leaves_as_they_are_are_not_rounded(name: str, tmp_path: Path) -> None:
    """It rounds those of the products it makes of DequantizeLinear and MatMul. A Relu behind one kept it from that, and
    a head that is tied to the embedding lies as the lookup needs it, which it makes no product of."""
    write_small(name, tmp_path / "ck", num_hidden_layers=1)
    export = export_onnx(tmp_path / "ck", tmp_path / "b", ExportOptions(target="onnx", dtype="fp32", capacity=32,
                                                                       quantize="int4"))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "made.onnx"), 3
    onnxruntime.InferenceSession(tmp_path / "b" / "model.onnx", options, providers=["CPUExecutionProvider"])
    made = [node for node in onnx.load(tmp_path / "made.onnx", load_external_data=False).graph.node
            if node.op_type == "MatMulNBits"]
    checkpoint = open_checkpoint(tmp_path / "ck")
    inputs = rounded_inputs(export.manifest, checkpoint, load_model(checkpoint, "float32"))
    assert len(made) == len(inputs) == 7  # of one layer: six and the head, or seven


def test_blocks_that_the_checkpoint_does_not_have_are_refused(tmp_path: Path) -> None:
    source = FORMS["minima"](tmp_path)
    manifest = export_onnx(source, tmp_path / "kept", ExportOptions(target="ort", dtype="fp32", capacity=32)).manifest
    assert manifest.quantization is not None
    wrong = tuple(replace(each, block=16) if each.block else each for each in manifest.quantization.weights)
    edited = replace(manifest, quantization=replace(manifest.quantization, weights=wrong))
    checkpoint = open_checkpoint(str(source))
    with refused("E-BUNDLE-QUANTIZATION", InvalidBundle) as refusal:
        rounded_inputs(edited, checkpoint, load_model(checkpoint, "float32"))
    assert "blocks of 16 columns" in refusal.error.what


def test_a_product_whose_arguments_have_names_is_rounded_too() -> None:
    values, weight, bias = torch.randn(3, 32), torch.randn(8, 32), torch.randn(8)
    linear = torch.nn.functional.linear
    with RoundInputs({id(weight): RoundedInput(16)}):
        by_place = linear(values, weight, bias)
        by_name = [linear(input=values, weight=weight, bias=bias), linear(values, weight=weight, bias=bias)]
        other = linear(input=values, weight=weight + 0)
    assert not torch.equal(by_place, linear(values, weight, bias))
    assert all(torch.equal(each, by_place) for each in by_name)
    assert torch.equal(other, linear(values, weight))


def test_experts_are_met_however_a_model_turns_what_it_picked() -> None:
    """dbrx multiplies by `w.view(..)[number].T`, others by `w[number].float()`: what is not met is judged as if nothing
    were rounded there."""
    stack, values = torch.randn(3 * 16, 32), torch.randn(5, 32)
    expert = stack.view(3, 16, 32)[1]
    nearly = rounded(values, 16) @ expert.T
    rule = {id(stack): RoundedInput(16, experts=3)}
    for product in (lambda: values.matmul(stack.view(3, 16, 32)[1].T), lambda: values @ stack.view(3, 16, 32)[1].mT,
                    lambda: torch.mm(values, stack.view(3, 16, 32)[1].t().float()),
                    lambda: torch.nn.functional.linear(values, stack.view(3, 16, 32)[torch.tensor(1)].double().float()),
                    lambda: torch.bmm(stack.view(3, 16, 32)[torch.tensor([1])], values.T[None])[0].T):
        with RoundInputs(rule) as rounding:
            found = product()
        assert rounding.met == {id(stack)}
        assert torch.allclose(found, nearly, rtol=1e-5, atol=1e-5)  # fp32 sums in another order
    assert not torch.allclose(values @ expert.T, nearly, rtol=1e-3)
    with RoundInputs(rule) as rounding:
        torch.nn.functional.linear(values, stack.sum() + torch.randn(16, 32))
    assert not rounding.met
