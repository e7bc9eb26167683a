"""Exports that quantize, and those that keep what the checkpoint stores quantized."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gqa_models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoint.quantized import test_gptq_awq as gptq_awq
from quantized_checkpoints import write_quantized
from refusal import refused
from safetensors.numpy import load_file, save_file
from small_text import SENTENCES, byte_tokenizer

from gqa_export.bundle.quantization import PLAIN
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import GqaExportError, InvalidBundle, UnsupportedModel
from gqa_export.exporting.dry_run import dry_run
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import Export, export_onnx
from gqa_export.quantizing import rtn
from gqa_export.quantizing.calibrate import Calibration, calibrate
from gqa_export.quantizing.importance import FILE, read_importance
from gqa_export.quantizing.matrices import Weight
from gqa_export.quantizing.rtn import quantize_matrix, quantize_rows
from gqa_export.quantizing.rules import Rule, decide, read_rules
from gqa_export.validation.validate import validate

TOKENS = np.array([[1, 5, 7, 2, 9, 30, 4, 11]], np.int64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gqa_models.write_tiny("llama_tied", tmp_path_factory.mktemp("checkpoint") / "llama_tied")


def export(source: Path, folder: Path, **options: Any) -> Export:
    return export_onnx(source, folder, ExportOptions(capacity=64, **options))


def logits(folder: Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    feeds = {each.name: np.zeros([1, each.shape[1], 0, each.shape[3]], np.float32) for each in session.get_inputs()[2:]}
    return session.run(["logits"], {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS), **feeds})[0]


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def operators(folder: Path) -> dict[str, int]:
    nodes = [node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node]
    return {name: nodes.count(name) for name in set(nodes)}


def rounded(checkpoint: Path, folder: Path, bits: int) -> Path:
    """A copy of the checkpoint whose matrices have the values that the quantizer gives them."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if values.ndim == 2:
            matrix = quantize_matrix(lambda start, stop, of=values: of[start:stop], values.shape,
                                     8 if "layers" not in name else bits, 32, name)
            tensors[name] = matrix.dequantize().astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(("target", "method"), [("ort", "int4"), ("ort", "int8"), ("onnx", "int4"),
                                                ("portable", "int8")])
def test_an_export_computes_what_the_rounded_weights_compute(checkpoint: Path, tmp_path: Path, target: str,
                                                             method: str) -> None:
    done = export(checkpoint, tmp_path / "quantized", target=target, quantize=method, activations="exact")
    export(rounded(checkpoint, tmp_path / "rounded", int(method[3:])), tmp_path / "plain", target=target)
    # of fp32 sums in another order, through two layers
    assert error(logits(tmp_path / "quantized"), logits(tmp_path / "plain")) < 1e-5
    quantization = done.manifest.quantization
    assert quantization is not None
    assert quantization.method == method
    assert quantization.activations == "exact"
    assert not any(weight.operator == PLAIN or weight.lossless for weight in quantization.weights)
    assert sum(weight.bytes for weight in quantization.weights) <= done.manifest.bytes_copied


@pytest.mark.parametrize("rows", ["all", "last"])
@pytest.mark.parametrize("target", ["ort", "onnx", "portable"])
def test_left_padding_gives_nan_through_products_that_hide_it(checkpoint: Path, tmp_path: Path, target: str,
                                                              rows: str) -> None:
    """ONNX Runtime's products with int8 activations make zeros of NaN."""
    export(checkpoint, tmp_path / "b", target=target, quantize="int8", logits=rows)
    session = onnxruntime.InferenceSession(tmp_path / "b" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {each.name: np.zeros([2, each.shape[1], 0, each.shape[3]], np.float32) for each in session.get_inputs()[2:]}
    mask = np.ones((2, 8), np.int64)
    mask[1, :3] = 0
    got = session.run(["logits"], {"input_ids": np.repeat(TOKENS, 2, 0), "attention_mask": mask, **feeds})[0]
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[0]).all()


@pytest.mark.parametrize("target", ["onnx", "portable"])
def test_a_sequence_beyond_the_cache_gives_nan_through_products_that_hide_it(checkpoint: Path, tmp_path: Path,
                                                                             target: str) -> None:
    """o_proj makes zeros of the NaN that attention writes into a row that cannot be right; the guard of the logits
    tells such rows too."""
    export(checkpoint, tmp_path / "b", target=target, quantize="int8", cache="static")
    session = onnxruntime.InferenceSession(tmp_path / "b" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {each.name: np.zeros([2, each.shape[1], 64, each.shape[3]], np.float32)
             for each in session.get_inputs()[2:]}
    mask = np.ones((2, 70), np.int64)  # 62 tokens before, and room for 64
    mask[0, 20:] = 0
    got = session.run(["logits"], {"input_ids": np.repeat(TOKENS, 2, 0), "attention_mask": mask, **feeds})[0]
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[0]).all()


def test_the_head_and_the_embedding_are_one_matrix_in_the_file(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "b", quantize="int4")
    model = onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False)
    places = [{entry.key: entry.value for entry in tensor.external_data}["offset"] for tensor in model.graph.initializer
              if ".codes" in tensor.name and "layers" not in tensor.name]
    assert len(places) == 2
    assert len(set(places)) == 1
    levels = [attribute.i for node in model.graph.node for attribute in node.attribute
              if attribute.name == "accuracy_level"]
    assert levels
    assert set(levels) == {4}


@pytest.mark.parametrize(("head", "operator", "bits"), [("same", "MatMulNBits, GatherBlockQuantized", 4),
                                                        ("int8", "MatMulNBits, GatherBlockQuantized", 8),
                                                        ("none", PLAIN, 32)])
def test_the_head_has_bits_of_its_own(checkpoint: Path, tmp_path: Path, head: str, operator: str, bits: int) -> None:
    done = export(checkpoint, tmp_path / "b", quantize="int4", head=head)
    assert done.manifest.quantization is not None
    weight = next(each for each in done.manifest.quantization.weights if "layers" not in each.name)
    assert (weight.operator, weight.bits) == (operator, bits)
    assert bool(weight.reason) == (head == "none")


def test_rules_of_a_file_decide_matrix_by_matrix(checkpoint: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nmatch = "*.0.mlp.*"\nbits = 8\nblock = 64\n[[rule]]\nmatch = "*v_proj*"\nbits = 0\n'
                     '[[rule]]\nmatch = "*"\nbits = 4\n')
    done = export(checkpoint, tmp_path / "b", quantize=str(rules))
    assert done.manifest.quantization is not None
    assert done.manifest.quantization.method == "rules"
    found = {each.name: (each.bits, each.operator) for each in done.manifest.quantization.weights}
    assert found["model.layers.0.mlp.up_proj.weight"] == (8, "MatMulNBits")
    assert found["model.layers.1.mlp.up_proj.weight"] == (4, "MatMulNBits")
    assert found["model.layers.1.self_attn.v_proj.weight"] == (32, PLAIN)
    assert found["model.layers.1.self_attn.q_proj.weight"] == (4, "MatMulNBits")
    assert math.isfinite(float(logits(tmp_path / "b").sum()))


def test_a_plain_checkpoint_kept_is_the_plain_export(checkpoint: Path, tmp_path: Path) -> None:
    done = export(checkpoint, tmp_path / "a")
    assert done.manifest.quantization is None
    assert "MatMulNBits" not in operators(tmp_path / "a")


def test_linked_weights_are_quantized_too(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "copied", quantize="int4")
    export(checkpoint, tmp_path / "linked", quantize="int4", weights="link")
    assert error(logits(tmp_path / "linked"), logits(tmp_path / "copied")) < 1e-5


def test_a_dry_run_knows_the_size(checkpoint: Path, tmp_path: Path) -> None:
    plan = dry_run(checkpoint, ExportOptions(capacity=64, quantize="int4"))
    done = export(checkpoint, tmp_path / "b", quantize="int4")
    assert {name: size for name, size, _ in plan.files}["model.onnx.data"] == done.manifest.bytes_copied


@pytest.mark.parametrize(("text", "word"), [
    ("[[rule]]\nmatch='*'\nbits=5", "bits"), ("[[rule]]\nbits=4", "match"), ("[[rule]]\nmatch='*'\nbits=true", "bits"),
    ("[[rule]]\nmatch='*'\nbits=4\nblock=48", "block"), ("[[rule]]\nmatch='*'\nbits=4\nbit=3", "'bit'"), ("x=1", "x"),
    ("rule=3", "rule"), ("[[rule", "rules"), ("", "nothing")])
def test_a_file_that_is_not_rules_is_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with refused("E-OPTION-QUANTIZE-FILE") as refusal:
        read_rules(path)
    assert word in refusal.error.what


def test_a_rule_that_matches_nothing_is_refused() -> None:
    with refused("E-OPTION-QUANTIZE-RULE"):
        decide([Weight("a", (8, 8), "linear")], 0, 32, "int8", (Rule("a", 4), Rule("b", 4)))


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq") / "gptq"
    write_quantized(folder, gptq_awq.entry(4, 32), gptq_awq.gptq(4, 32), num_hidden_layers=1)
    return folder


def test_what_no_rule_names_stays_as_a_quantized_checkpoint_holds_it(gptq: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nmatch = "*q_proj*"\nbits = 8\n[[rule]]\nmatch = "*k_proj*"\nbits = 0\n')
    done = export(gptq, tmp_path / "b", quantize=str(rules))
    assert done.manifest.quantization is not None
    found = {each.name.removeprefix("model.layers.0."): each for each in done.manifest.quantization.weights}
    rounded, kept = found["self_attn.q_proj.weight"], [found[f"self_attn.{each}_proj.weight"] for each in "kv"]
    assert (rounded.bits, rounded.rounded_bits, rounded.lossless) == (8, 8, False)
    for each in kept:  # one that a rule leaves, and one that none names
        assert (each.operator, each.bits, each.rounded_bits, each.lossless, each.reason) == (
            "MatMulNBits", 4, 0, True, "")
        assert each.stored.startswith("GPTQ 4 bits")
    assert (found["lm_head.weight"].operator, found["lm_head.weight"].reason) == (PLAIN, "no rule names it")
    said = [note for note in done.notes if "rounded once more" in note]
    assert len(said) == 1
    assert said[0].startswith("1 of 7 matrices that the checkpoint holds as codes (GPTQ 4 bits, group 32)")
    assert "self_attn.q_proj.weight" in said[0]
    assert dry_run(gptq, ExportOptions(capacity=64, quantize=str(rules))).notes == tuple(
        note for note in done.notes if "tokenizer" not in note)
    # held against values that are rounded once more for one matrix alone
    verdict = validate(tmp_path / "b", gptq, steps=2)
    assert verdict.passed, verdict.first


def test_codes_that_are_rounded_once_more_are_noted(gptq: Path) -> None:
    plan = dry_run(gptq, ExportOptions(capacity=64, quantize="int4"))
    assert any(note.startswith("7 of 7 matrices") and "rounded once more" in note for note in plan.notes)
    assert not any("once more" in note for note in dry_run(gptq, ExportOptions(capacity=64)).notes)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_rule_may_call_a_tied_weight_by_either_name(checkpoint: Path, tmp_path: Path, name: str) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(f'[[rule]]\nmatch = "{name}"\nbits = 2\n[[rule]]\nmatch = "*"\nbits = 4\n')
    plan = dry_run(checkpoint, ExportOptions(capacity=64, quantize=str(rules)))
    tied = next(line for line in plan.quantization if "lm_head" in line or "embed_tokens" in line)
    assert "-> 2 bits" in tied or "rounded to 2 bits" in tied, tied


@pytest.mark.parametrize(("options", "code", "place"), [
    ({"head": "same"}, "E-OPTION-QUANTIZE-UNUSED", "--head"),
    ({"block": 64, "quantize": "dequantize"}, "E-OPTION-QUANTIZE-UNUSED", "--block"),
    ({"head": "none", "block": 64}, "E-OPTION-QUANTIZE-UNUSED", "--head, --block"),
    ({"head": "int8", "quantize": "r.toml"}, "E-OPTION-QUANTIZE-HEAD", "--head"),
    ({"head": "int8", "quantize": "r.toml", "max_size": 10**9}, "E-OPTION-QUANTIZE-HEAD", "--head")])
def test_options_that_would_have_no_effect_are_refused(checkpoint: Path, tmp_path: Path, options: dict[str, Any],
                                                       code: str, place: str) -> None:
    if "quantize" in options and options["quantize"].endswith(".toml"):
        (tmp_path / "r.toml").write_text('[[rule]]\nmatch = "*"\nbits = 4\n')
        options = {**options, "quantize": str(tmp_path / "r.toml")}
    with refused(code) as caught:
        export(checkpoint, tmp_path / "b", **options)
    assert caught.error.where == place
    assert not (tmp_path / "b").exists()


def test_an_unknown_method_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with refused("E-OPTION-QUANTIZE", GqaExportError):
        export(checkpoint, tmp_path / "b", quantize="int3")


def test_routers_stay_as_they_are() -> None:
    assert [each.bits for each in decide([Weight("r", (8, 64), "router"), Weight("w", (8, 64), "linear")], 4, 32,
                                         "int8")] == [0, 4]


def test_a_searched_scale_beats_the_largest_number() -> None:
    values = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    matrix = quantize_matrix(lambda start, stop: values[start:stop], values.shape, 4, 32, "x")
    full = values.reshape(-1, 32)
    extreme = np.take_along_axis(full, np.abs(full).argmax(1)[:, None], 1) / -8
    rounded = np.clip(np.rint(full / extreme), -8, 7) * extreme
    assert error(matrix.dequantize(), values) < 0.95 * error(rounded.reshape(values.shape), values)


def test_weighed_columns_are_met_better() -> None:
    values = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    importance = np.where(np.arange(128) % 32 < 4, 100.0, 1.0).astype(np.float32)
    found = {}
    for name, weight in (("plain", None), ("weighted", importance)):
        stripe = quantize_rows(values, 4, 32, "x", weight)
        difference = (stripe.codes.reshape(64, 4, 32) * stripe.scale[..., None]).reshape(64, 128) - values
        found[name] = float((importance * difference**2).sum())
    assert found["weighted"] < 0.8 * found["plain"]


def test_eight_bits_search_for_a_scale_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normal numbers: with the scale of the largest one alone the squared error is larger by a sixth or more."""
    values = np.random.default_rng(2).normal(size=(4096, 32)).astype(np.float32)

    def error() -> float:
        stripe = quantize_rows(values, 8, 32, "x")
        return float(np.square(stripe.codes * stripe.scale - values).sum())

    searched = error()
    monkeypatch.setitem(rtn.FACTORS, 8, (1.0,))
    assert searched < 0.86 * error()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_and_exact_grids_lose_nothing(bits: int) -> None:
    codes = np.random.default_rng(0).integers(-(1 << (bits - 1)), 1 << (bits - 1), (16, 64))
    codes[:, ::32] = -(1 << (bits - 1))  # the range is used
    values = (codes * 0.125).astype(np.float32)
    values[3] = 0
    matrix = quantize_matrix(lambda start, stop: values[start:stop], values.shape, bits, 32, "x")
    assert np.array_equal(matrix.dequantize(), values)


def test_scales_above_zero_lose_as_little_and_take_every_code() -> None:
    """TensorRT's parser takes no others with eight bits."""
    values = np.random.default_rng(0).normal(0, 0.02, (64, 256)).astype(np.float32)

    def matrix(positive: bool):
        return quantize_matrix(lambda start, stop: values[start:stop], values.shape, 8, 32, "x", positive=positive)

    assert (matrix(True).stripe().scale > 0).all()
    assert error(matrix(True).dequantize(), values) < 1.02 * error(matrix(False).dequantize(), values)


@pytest.mark.parametrize(("value", "code"), [(np.nan, "E-MODEL-QUANTIZE-VALUE"), (np.inf, "E-MODEL-QUANTIZE-VALUE"),
                                             (1e7, "E-MODEL-QUANTIZE-SCALE"), (1e-8, "E-MODEL-QUANTIZE-SCALE")])
def test_values_that_codes_cannot_hold_are_refused(value: float, code: str) -> None:
    with refused(code, UnsupportedModel):
        quantize_rows(np.full((4, 64), value, np.float32), 4, 32, "x")


def test_the_manifest_is_read_again(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "b", quantize="int8")
    found = json.loads((tmp_path / "b" / "gqa_export.json").read_text())["quantization"]
    assert found["method"] == "int8"
    assert {each["bits"] for each in found["weights"]} == {8}


def test_a_calibration_text_lowers_the_error_of_the_logits(checkpoint: Path, tmp_path: Path) -> None:
    """The tiny model's inputs do not differ much; what is held is that its scales follow the text's statistics."""
    folder = shutil.copytree(checkpoint, tmp_path / "with")
    byte_tokenizer(folder)
    text = tmp_path / "text.txt"
    text.write_text("".join(SENTENCES) * 8)
    found = calibrate(open_checkpoint(folder), text, {"model.layers.1.mlp.down_proj.weight"}, lambda *_: None)
    importance = found.importance["model.layers.1.mlp.down_proj.weight"]
    assert importance.ndim == 1
    assert importance.min() > 0
    assert importance.max() > 2 * importance.min()
    plain = export(folder, tmp_path / "plain", quantize="int4").manifest.quantization
    done = export(folder, tmp_path / "weighed", quantize="int4", calibrate=text).manifest.quantization
    assert plain is not None
    assert done is not None
    assert (plain.calibration, plain.tokens) == ("", 0)
    assert done.calibration == found.sha256
    assert done.tokens == found.tokens > 0
    # the bundle holds by what its scales were chosen, for those who make them again
    again = read_importance(tmp_path / "weighed")
    assert np.array_equal(again["model.layers.1.mlp.down_proj.weight"], importance)
    assert set(again) == {each.name for each in done.weights}
    assert not (tmp_path / "plain" / FILE).exists()
    (tmp_path / "weighed" / FILE).write_bytes(b"broken")
    with refused("E-BUNDLE-CALIBRATION", InvalidBundle):
        read_importance(tmp_path / "weighed")
    data = [(tmp_path / name / "model.onnx.data").read_bytes() for name in ("plain", "weighed")]
    assert len(data[0]) == len(data[1])
    assert data[0] != data[1]


@pytest.fixture(scope="module")
def readable(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with a tokenizer, and a text."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("readable") / "with")
    byte_tokenizer(folder)
    (folder.parent / "text.txt").write_text("".join(SENTENCES))
    return folder, folder.parent / "text.txt"


def calibrated(readable: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None],
               *names: str) -> Calibration:
    """What the text says of a model that was changed after it was read."""
    def load(*arguments: Any) -> Any:
        model = load_model(*arguments)
        change(model)
        return model

    monkeypatch.setattr("gqa_export.quantizing.calibrate.load_model", load)
    return calibrate(open_checkpoint(readable[0]), readable[1], names, lambda *_: None)


DOWN = "model.layers.0.mlp.down_proj.weight"


def test_a_matrix_that_gets_no_rows_at_times_is_calibrated(readable, monkeypatch) -> None:
    """As an expert that is a module of its own does, when no token of a row chooses it."""
    def change(model: Any) -> None:
        layer = model.model.layers[0].mlp
        layer.register_forward_hook(lambda *_: (layer.down_proj(torch.zeros(0, layer.down_proj.in_features)), None)[1])

    found = calibrated(readable, monkeypatch, change, DOWN)
    plain = calibrated(readable, monkeypatch, lambda _: None, DOWN)
    assert found.largest[DOWN] == plain.largest[DOWN] > 0
    assert np.array_equal(found.importance[DOWN], plain.importance[DOWN])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused(readable, monkeypatch, value: float) -> None:
    """A NaN is above nothing, so that the largest would be that of the others; no scale comes out of either."""
    def change(model: Any) -> None:
        model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
            lambda _, given: (given[0] + torch.where(torch.arange(given[0].shape[-1]) == 3, value, 0.0),))

    with refused("E-MODEL-QUANTIZE-VALUE", UnsupportedModel) as refusal:
        calibrated(readable, monkeypatch, change, DOWN)
    assert DOWN in refusal.error.what


def test_the_heads_input_is_what_the_model_hands_it(readable, monkeypatch) -> None:
    """Some models divide the last hidden state first (Inkling, MiniCPM). The tied head has the embedding's name."""
    def change(model: Any) -> None:
        model.forward = lambda **given: model.lm_head(model.model(**given).last_hidden_state / 4)

    name = "model.embed_tokens.weight"
    found, plain = (calibrated(readable, monkeypatch, each, name, DOWN) for each in (change, lambda _: None))
    assert found.largest[name] == plain.largest[name] / 4 > 0
    assert np.array_equal(found.importance[name], plain.importance[name] / 16)
    assert found.largest[DOWN] == plain.largest[DOWN]


def test_a_text_without_quantizing_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with refused("E-OPTION-CALIBRATE"):
        export(checkpoint, tmp_path / "b", calibrate=tmp_path / "text.txt")


@pytest.mark.parametrize(("dtype", "loss"), [("fp32", "lossless"), ("bf16", "rounded"), ("fp16", "rounded")])
def test_a_plain_weight_of_fewer_bits_than_it_was_stored_in_is_rounded(checkpoint: Path, dtype: str,
                                                                       loss: str) -> None:
    lines = dry_run(checkpoint, ExportOptions(quantize="int8", head="none", dtype=dtype, capacity=64)).quantization
    (line,) = [line for line in lines if "plain" in line]
    assert line.strip().startswith("lm_head.weight: float32 -> ")
    assert f"plain, {loss}, " in line
    assert all("rounded" in line for line in lines if "MatMulNBits" in line)


@pytest.mark.parametrize(("target", "methods"), [("ort", "int4 or int8"),
                                                 ("trt-plugin", "int4 or int8 or fp8 or nvfp4")])
@pytest.mark.parametrize("options", [{"calibrate": Path("text.txt")}, {"quantize": "int3"}])
def test_a_fix_names_the_methods_that_the_target_takes(tmp_path: Path, target: str, methods: str,
                                                       options: dict[str, Any]) -> None:
    with pytest.raises(GqaExportError) as refusal:
        export(tmp_path / "no such checkpoint", tmp_path / "b", target=target, **options)
    named = methods if "calibrate" in options else methods.replace(" or ", ", ")
    assert named in refusal.value.fix
    assert ("fp8" in refusal.value.fix) == ("fp8" in methods)


@pytest.mark.parametrize("target", ["trt-native", "trt-plugin"])
@pytest.mark.parametrize("method", ["keep", "int8"])
def test_rounded_inputs_of_products_are_refused_for_engines(tmp_path: Path, target: str, method: str) -> None:
    """ONNX Runtime rounds them; of an engine the manifest would say what does not happen."""
    with refused("E-TARGET-OPTION") as refusal:
        export(tmp_path / "no such checkpoint", tmp_path / "b", target=target, quantize=method, activations="int8")
    assert refusal.error.where == "--activations"
    assert target in refusal.error.what
    assert "leave out --activations" in refusal.error.fix
