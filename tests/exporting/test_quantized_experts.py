"""Exports whose experts are quantized: kept as the checkpoint has them, and rounded by the export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import gqa_models
import numpy as np
import onnxruntime
import pytest
from checkpoint.quantized import test_compressed_tensors as compressed
from checkpoint.quantized.test_experts import write_gpt_oss, write_mixtral
from checkpoint.quantized.test_gptq_awq import entry, gptq
from evidence.mutations.mutation import break_bundle
from evidence.mutations.of_quantized import experts_exchanged, scale_of_another_expert
from gguf_models import case, tensors_of, write_case
from gqa_models.shrink import write_small
from small_text import SENTENCES, byte_tokenizer

from gqa_export.bundle.quantization import PLAIN
from gqa_export.exporting.dry_run import dry_run
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import Export, export_onnx
from gqa_export.quantizing.importance import read_importance
from gqa_export.validation.validate import validate

pytestmark = pytest.mark.whole_model
TOKENS = np.array([[1, 5, 7, 2, 9, 30, 4, 11]], np.int64)


def export(source: Path, folder: Path, **options: Any) -> Export:
    return export_onnx(source, folder, ExportOptions(**{"capacity": 64, "dtype": "fp32", **options}))


def experts_of(done: Export) -> dict[str, Any]:
    """What the manifest says of the stacked matrices of experts, by name."""
    return {each.name: each for each in done.manifest.quantization.weights if each.name.endswith("_proj")
            and "experts" in each.name}


def logits(folder: Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    feeds = {each.name: np.zeros([1, each.shape[1], 0, each.shape[3]], np.float32) for each in session.get_inputs()[2:]}
    return session.run(["logits"], {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS), **feeds})[0]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gqa_models.write_tiny("mixtral", tmp_path_factory.mktemp("ck") / "mixtral")


@pytest.fixture(scope="module")
def int4(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export(mixtral, tmp_path_factory.mktemp("b") / "int4", quantize="int4")


def test_four_bits_are_exact_and_as_shipped_what_pytorch_computes_by_the_same_rule(mixtral: Path, int4: Export) -> None:
    found = experts_of(int4)
    assert len(found) == 4
    assert {(each.operator, each.bits, each.experts, each.reason) for each in found.values()} == \
        {("MatMulNBits", 4, 4, "")}
    # codes of 4 bits and a scale of 16 bits for each 32 columns
    assert sum(each.bytes for each in found.values()) == 2 * 4 * 3 * 64 * 128 * 4.5 / 8
    verdict = validate(int4.folder, mixtral, steps=2)
    assert (verdict.passed, verdict.export_exact, verdict.as_shipped) == (True, True, True), verdict.failure


@pytest.mark.parametrize("change", [experts_exchanged, scale_of_another_expert])
def test_an_expert_in_anothers_place_is_found(mixtral: Path, int4: Export, tmp_path: Path, change: Any) -> None:
    broken = break_bundle(int4.folder, tmp_path / "broken", change)
    verdict = validate(broken, mixtral, steps=2)
    assert not verdict.export_exact


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_mxfp4_of_gpt_oss_is_kept(tmp_path: Path, target: str) -> None:
    """Its biases, its clamped gate with alpha and its interleaved rows are the graph's own, as they were."""
    values = write_gpt_oss(tmp_path / "ck")
    done = export(tmp_path / "ck", tmp_path / "b", target=target, activations="exact")
    found = experts_of(done)
    assert set(found) == set(values)
    for name, each in found.items():
        assert (each.stored, each.bits, each.lossless, each.experts) == ("MXFP4", 8, True, 4)
        assert each.bytes == values[name].size * (1 + 2 / 32)
    if target == "ort":
        verdict = validate(tmp_path / "b", tmp_path / "ck", steps=2)
        assert verdict.passed, verdict.failure
        return
    export(tmp_path / "ck", tmp_path / "plain", target=target, quantize="dequantize")
    got, wanted = logits(tmp_path / "b"), logits(tmp_path / "plain")
    assert np.abs(got - wanted).max() < 2e-5 * np.abs(wanted).max()  # of fp32 sums in another order


def test_single_experts_of_a_quantized_checkpoint_are_kept(tmp_path: Path) -> None:
    write_mixtral(tmp_path / "ck", compressed.entry("pack-quantized", num_bits=4, group_size=32),
                  compressed.packed(4, 32))
    done = export(tmp_path / "ck", tmp_path / "b", target="portable", activations="exact")
    assert {(each.operator, each.bits, each.lossless) for each in experts_of(done).values()} == \
        {("DequantizeLinear", 4, True)}
    export(tmp_path / "ck", tmp_path / "plain", target="portable", quantize="dequantize")
    got, wanted = logits(tmp_path / "b"), logits(tmp_path / "plain")
    assert np.abs(got - wanted).max() < 2e-5 * np.abs(wanted).max()  # of fp32 sums in another order


def test_codes_are_kept_beside_those_that_cannot_be_stacked(tmp_path: Path) -> None:
    """Each expert has its columns in an order of its own; two that are joined have two orders in one matrix."""
    write_mixtral(tmp_path / "ck", entry(), gptq(order=True))
    done = export(tmp_path / "ck", tmp_path / "b", activations="exact")
    found = experts_of(done)
    joined, single = (found[f"model.layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    assert (single.operator, single.bits, single.lossless) == ("MatMulNBits", 4, True)
    assert (joined.operator, joined.stored) == (PLAIN, "GPTQ 4 bits, group 32")
    assert "forms that are not one" in joined.reason
    export(tmp_path / "ck", tmp_path / "plain", quantize="dequantize")
    got, wanted = logits(tmp_path / "b"), logits(tmp_path / "plain")
    assert np.abs(got - wanted).max() < 2e-5 * np.abs(wanted).max()  # of fp32 sums in another order


@pytest.mark.parametrize(("name", "fields", "target", "options"), [
    ("qwen3_moe", {"num_hidden_layers": 1}, "ort", {"activations": "exact"}),
    ("dbrx", {"num_hidden_layers": 1}, "onnx", {}),
    ("longcat_flash", {"num_layers": 2, "num_hidden_layers": 4}, "ort", {}),
    ("jetmoe", {"num_hidden_layers": 1}, "ort", {})])
def test_eight_bits_are_exact_and_as_shipped_what_pytorch_computes(tmp_path: Path, name: str, fields: dict, target: str,
                                                                   options: dict) -> None:
    """A router that renormalises; experts one below the other, of which one matrix lies the other way round; experts
    that hand on what they get; experts of attention. As shipped PyTorch rounds the inputs of every one of them."""
    write_small(name, tmp_path / "ck", **fields)
    done = export(tmp_path / "ck", tmp_path / "b", target=target, quantize="int8", **options)
    weights = [each for each in done.manifest.quantization.weights if each.experts]
    assert weights
    assert all(each.bits == 8 and each.operator != PLAIN for each in weights)
    verdict = validate(tmp_path / "b", tmp_path / "ck", steps=2)
    assert verdict.passed, verdict.failure
    assert verdict.as_shipped is (None if options else True)
    assert not [note for note in verdict.notes if "in another way than a product" in note]


def test_what_a_gguf_file_stores_and_codes_do_not_hold_is_named(tmp_path: Path) -> None:
    """Two matrices of an expert that the model has as one, of different types, and types that are not kept. Both were
    called float32."""
    architecture, keys, _ = case("qwen3moe")
    keys = {**keys, "feed_forward_length": 256, "expert_feed_forward_length": 256}
    types = {"ffn_up_exps": gguf.GGMLQuantizationType.Q8_0, "ffn_down_exps": gguf.GGMLQuantizationType.TQ2_0}
    source = write_case(tmp_path / "model.gguf", "qwen3moe", keys, tensors_of(architecture, keys, {}),
                        stored=gguf.GGMLQuantizationType.Q4_0, types=types)
    plan = dry_run(source, ExportOptions(target="ort", capacity=64, dtype="fp32"))
    joined, single = (line for line in plan.quantization if "experts." in line)
    assert "GGUF Q4_0 and Q8_0 -> 32 bits, plain" in joined
    assert "in forms that are not one" in joined
    assert "GGUF TQ2_0 -> 32 bits, plain" in single
    assert "not kept" in single
    assert sum("float32 ->" in line for line in plan.quantization) == 0


def test_a_plan_names_what_an_engine_cannot_hold(mixtral: Path) -> None:
    rows = [line for line in dry_run(mixtral, ExportOptions(target="trt-native", capacity=64, dtype="fp32",
                                                            quantize="int4")).quantization if "experts." in line]
    assert len(rows) == 2
    assert all("plain, lossless" in row and "TensorRT" in row for row in rows)


def test_a_rule_may_leave_experts_as_they_are(mixtral: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nmatch = "*.down_proj"\nbits = 8\nblock = 64\n'
                     '[[rule]]\nmatch = "*.experts.*"\nbits = 0\n[[rule]]\nmatch = "*"\nbits = 4\n')
    plan = dry_run(mixtral, ExportOptions(target="ort", capacity=64, dtype="fp32", quantize=str(rules)))
    rows = [line for line in plan.quantization if "experts." in line]
    assert ["8 bits, MatMulNBits, block 64, 4 experts" in row for row in rows] == [False, True]
    assert "a rule leaves it" in rows[0]


def test_a_text_weighs_errors_of_experts_too(mixtral: Path, tmp_path: Path) -> None:
    """By the inputs of the rows that chose them; the reference has the same codes."""
    shutil.copytree(mixtral, tmp_path / "ck")
    byte_tokenizer(tmp_path / "ck")
    (tmp_path / "text.txt").write_text("".join(SENTENCES) * 3)
    export(tmp_path / "ck", tmp_path / "b", quantize="int4", calibrate=tmp_path / "text.txt", activations="exact")
    known = read_importance(tmp_path / "b")
    down = known["model.layers.1.mlp.experts.down_proj"]
    assert (down.shape, known["model.layers.1.mlp.experts.gate_up_proj"].shape) == ((128,), (64,))
    assert down.min() < down.mean() / 4  # columns differ: a scale that ignored them would be another
    verdict = validate(tmp_path / "b", tmp_path / "ck", steps=2)
    assert verdict.passed, verdict.failure
