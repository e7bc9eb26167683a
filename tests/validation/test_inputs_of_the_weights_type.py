"""Which inputs of products `--activations same` rounds, and by which scales: a checkpoint's own or a text's. The bundle
is exact without the rounding, and as good as PyTorch that rounds by the same rule with it."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoint.quantized import test_compressed_tensors as compressed
from checkpoint.quantized import test_other_formats as others
from quantized_checkpoints import write_quantized
from refusal import refused

from gqa_export.bundle.manifest import MANIFEST, MODEL, FileFact
from gqa_export.bundle.quantization import PLAIN
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import InvalidBundle
from gqa_export.exporting.dry_run import dry_run
from gqa_export.exporting.input_scales import NOT_MULTIPLIED
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.quantized.input_codes import held_as
from gqa_export.quantizing.importance import FILE, importance_file, read_importance, read_largest
from gqa_export.report.console import details
from gqa_export.validation.reference import runnable
from gqa_export.validation.validate import validate

from .rounded_bundles import CT, exported, largest, rounding, static

pytestmark = pytest.mark.whole_model


@pytest.mark.parametrize(("form", "target", "dtype"), [
    ("ModelOpt FP8", "trt-plugin", "bf16"), ("compressed-tensors FP8", "trt-native", "fp16"),
    ("NVFP4 of ModelOpt", "trt-native", "bf16"),
    ("NVFP4 of compressed-tensors", "trt-plugin", "fp16")])
def test_a_checkpoints_own_scales_round_the_inputs(tmp_path: Path, form: str, target: str, dtype: str) -> None:
    """q, k and v share what rounds their input, and so do gate and up: four for a layer."""
    checkpoint = static(tmp_path / "checkpoint", form)
    done = exported(checkpoint, tmp_path / "bundle", target, dtype)
    found, stored = rounding(done), open_checkpoint(checkpoint).quantized
    assert len(found) == 7
    for weight in found:
        assert weight.inputs == weight.kind
        assert weight.input_scale == held_as(stored[weight.name].input_scale, weight.kind, done.manifest.dtype)
    model = onnx.load(tmp_path / "bundle" / MODEL, load_external_data=False)
    makers = [node.op_type for node in model.graph.node if node.op_type in ("QuantizeLinear", "TRT_FP4DynamicQuantize")]
    assert len(makers) == 4
    verdict = validate(tmp_path / "bundle", checkpoint, steps=2)
    assert verdict.passed, verdict.failure
    assert (verdict.export_exact, verdict.as_shipped, verdict.activations) == (True, True, "same")
    shipped = largest(verdict, "as shipped")
    assert largest(verdict, "export exact") < 0.1 * shipped, "nothing was rounded"
    # beside PyTorch by the same rule nothing is left: no value of these cases lies on a tie
    assert max(case.eager_logits for case in verdict.cases if case.part == "as shipped" and case.rows) < 1e-3 * shipped
    lines = "\n".join(details(verdict))
    assert "rounded to the type of their weight" in lines
    assert f"the inputs of 7 matrices are rounded to the type of their weight ({found[0].kind})" in lines


def test_without_the_option_nothing_is_rounded(fp8, tmp_path: Path) -> None:
    done = export_onnx(fp8[0], tmp_path / "b", ExportOptions(target="trt-native", dtype="fp32", capacity=48))
    assert done.manifest.quantization is not None
    assert done.manifest.quantization.activations == "exact"
    assert "inputs" not in json.loads((tmp_path / "b" / MANIFEST).read_text())["quantization"]["weights"][0]
    model = onnx.load(tmp_path / "b" / MODEL, load_external_data=False)
    assert not any(node.op_type == "QuantizeLinear" for node in model.graph.node)


@pytest.mark.parametrize(("entry", "encode", "reason"), [
    (CT, compressed.float8(lambda rows, _: (rows, 1)), "there is no static scale for its inputs"),
    (others.fp8(40, 24), others.fp8_blocks(40, 24), "TensorRT has products of FP8 whose weight has one scale, or one a "
     "row, and this has one for 24 columns")])
def test_weights_whose_inputs_stay_as_they_are_say_why(tmp_path: Path, entry: dict, encode, reason: str) -> None:
    """Inputs with scales of their own at every step, and DeepSeek's blocks."""
    write_quantized(tmp_path / "ck", entry, encode, num_hidden_layers=1)
    done = exported(tmp_path / "ck", tmp_path / "b")
    assert not rounding(done)
    assert done.manifest.quantization is not None
    reasons = {weight.inputs_reason for weight in done.manifest.quantization.weights if weight.operator != PLAIN}
    assert reasons == {reason}
    assert any("7 of 7 FP8 and NVFP4 matrices" in note for note in done.notes)
    assert f"inputs exact: {reason}" in "\n".join(done.manifest.quantization.lines())
    verdict = validate(tmp_path / "b", tmp_path / "ck", steps=2)
    assert verdict.passed
    assert verdict.activations == "exact"


@pytest.mark.parametrize(("method", "target", "dtype", "most"), [
    ("fp8", "trt-plugin", "bf16", 448.0), ("nvfp4", "trt-native", "fp16", 2688.0)])
def test_a_text_gives_the_scales_and_the_bundle_holds_them(plain, tmp_path: Path, method: str, target: str,
                                                           dtype: str, most: float) -> None:
    checkpoint, text = plain
    done = exported(checkpoint, tmp_path / "b", target, dtype, quantize=method, calibrate=text, head="same")
    found, sizes = rounding(done), read_largest(tmp_path / "b")
    assert {weight.name for weight in found} >= {"lm_head.weight"}
    assert len(found) == 8
    assert {weight.input_scale for weight in found} == {held_as(sizes[weight.name] / most, weight.kind,
                                                                done.manifest.dtype) for weight in found}
    (other,) = [weight for weight in done.manifest.quantization.weights if not weight.inputs]
    assert (other.name, other.inputs_reason) == ("model.embed_tokens.weight", NOT_MULTIPLIED)
    verdict = validate(tmp_path / "b", checkpoint, steps=2)
    assert verdict.passed, verdict.failure
    assert (verdict.export_exact, verdict.as_shipped, verdict.activations) == (True, True, "same")
    lines = "\n".join(done.manifest.quantization.lines())
    assert "inputs of products rounded to the type of their weight" in lines
    assert "input scale" in lines
    data = importance_file(read_importance(tmp_path / "b"), {name: 2 * size for name, size in sizes.items()})
    (tmp_path / "b" / FILE).write_bytes(data)
    files = {**done.manifest.files, FILE: FileFact(len(data), hashlib.sha256(data).hexdigest())}
    (tmp_path / "b" / MANIFEST).write_text(replace(done.manifest, files=files).to_json())
    with refused("E-BUNDLE-QUANTIZATION", InvalidBundle):
        validate(tmp_path / "b", checkpoint, steps=2, check_hashes=False)


def test_a_sequence_beyond_the_cache_gives_nan_through_inputs_that_have_none(plain, tmp_path: Path) -> None:
    """Attention answers it with NaN, float4 has no code for that, and so its product has a guard; so has the head's."""
    done = exported(plain[0], tmp_path / "b", "trt-plugin", "fp32", quantize="nvfp4", calibrate=plain[1], head="same")
    model = onnx.load(tmp_path / "b" / MODEL, load_external_data=False)
    guards = {node.name for node in model.graph.node if node.op_type == "IsNaN" and node.name.endswith("/nan/there")}
    assert guards == {f"{name}/MatMul_0/nan/there" for name in ("model.layers.0.self_attn.o_proj", "lm_head")}
    with ExitStack() as stack:
        _, folder, _ = runnable(stack, tmp_path / "b", done.manifest, "float32", [], lambda *_: None)
        session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
        feeds = {each.name: np.zeros([2, *each.shape[1:]], np.float32) for each in session.get_inputs()
                 if "past_key_values" in each.name}
        ids = np.arange(16, dtype=np.int32).reshape(2, 8)
        logits = session.run(["logits"], {"input_ids": ids, "past_lengths": np.array([4, 44], np.int32),
                                          "new_lengths": np.array([8, 8], np.int32), **feeds})[0]
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1]).all()


def test_integers_among_them_keep_their_inputs(plain, tmp_path: Path) -> None:
    """The head has eight bits by default."""
    plan = dry_run(plain[0], ExportOptions(target="trt-native", capacity=48, quantize="fp8", activations="same",
                                           calibrate=plain[1]))
    (head,) = [line for line in plan.quantization if "lm_head" in line]
    assert "inputs exact: inputs are not rounded for codes of integers" in head
    assert sum("inputs e4m3" in line and "input scale" in line for line in plan.quantization) == 7


@pytest.mark.parametrize(("options", "code", "words"), [
    ({"target": "ort"}, "E-TARGET-OPTION", "--target trt-plugin or trt-native"),
    ({"target": "onnx"}, "E-TARGET-OPTION", "--activations int8 or exact"),
    ({"target": "portable", "quantize": "int8"}, "E-TARGET-OPTION", "trt-native"),
    ({"quantize": "fp8"}, "E-OPTION-ACTIVATIONS", "--calibrate TEXT"),
    ({"quantize": "rules.toml"}, "E-OPTION-ACTIVATIONS", "--calibrate TEXT"),
    ({"quantize": "int4", "calibrate": Path("text.txt")}, "E-OPTION-ACTIVATIONS", "--quantize fp8"),
    ({"quantize": "dequantize"}, "E-OPTION-ACTIVATIONS", "--activations exact")])
def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path: Path, options: dict, code: str,
                                                           words: str) -> None:
    with refused(code) as refusal:
        export_onnx(tmp_path / "none", tmp_path / "b", ExportOptions(**{"target": "trt-native", **options},
                                                                     activations="same"))
    assert words in refusal.error.fix


def test_a_checkpoint_without_such_weights_is_refused(plain, tmp_path: Path) -> None:
    with refused("E-OPTION-ACTIVATIONS"):
        exported(plain[0], tmp_path / "b")
    assert not (tmp_path / "b").exists()
