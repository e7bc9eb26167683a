"""Bundles whose products have inputs of their weight's type: exact without the rounding, as good as PyTorch that rounds
by the same rule with it; and scales that are wrong, in the graph, the manifest or the checkpoint, are found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoint.quantized import test_compressed_tensors as compressed
from checkpoint.quantized import test_other_formats as others
from gqa_models import write_tiny
from quantized_checkpoints import change, write_quantized
from refusal import refused
from small_text import SENTENCES, byte_tokenizer

from gqa_export.bundle.engine_facts import ENGINE, EngineFacts
from gqa_export.bundle.manifest import MANIFEST, MODEL, FileFact, Manifest, read_manifest
from gqa_export.bundle.quantization import PLAIN, QuantizedWeight
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.engine.inspect_build import expected_aliases
from gqa_export.engine.profiles import make_profiles
from gqa_export.errors import InvalidBundle, NotCheckedHere
from gqa_export.exporting.dry_run import dry_run
from gqa_export.exporting.input_scales import NOT_MULTIPLIED
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import Export, export_onnx
from gqa_export.files.sha256 import file_sha256
from gqa_export.quantized.input_codes import held_as
from gqa_export.quantizing.importance import FILE, importance_file, read_importance, read_largest
from gqa_export.report.console import details
from gqa_export.validation.loss import LossRequest
from gqa_export.validation.reference import open_reference, runnable
from gqa_export.validation.sessions import bundle_session
from gqa_export.validation.validate import validate

pytestmark = pytest.mark.whole_model
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
CT = compressed.entry("float-quantized", type="float", group_size=None, num_bits=8, strategy="channel")
FORMATS = {
    "ModelOpt FP8": (MODELOPT, others.modelopt_fp8(lambda *_: ()), ".input_scale", 448.0),
    "compressed-tensors FP8": (CT, compressed.float8(lambda rows, _: (rows, 1), zero=True), ".input_scale", 448.0),
    "NVFP4 of ModelOpt": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, others.nvfp4,
                          ".input_scale", 2688.0),
    "NVFP4 of compressed-tensors": (compressed.entry("nvfp4-pack-quantized", type="float", group_size=16),
                                    compressed.four_bit_floats(True), ".input_global_scale", 2688.0),
}
"""name -> description, encoding, what the scale of an input is called, the largest input of a scale of 1"""


def static(folder: Path, form: str) -> Path:
    """A checkpoint whose scales of inputs are those of its own inputs, for some tokens, as a quantizer chooses them.
    Matrices that share an input share the scale."""
    entry, encode, suffix, most = FORMATS[form]
    write_quantized(folder, entry, encode, num_hidden_layers=1)
    model = load_model(open_checkpoint(folder), "float32").eval()
    largest: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "proj" in name:
            def keep(_, given, name=name):
                largest[name] = float(given[0].abs().max())
            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(torch.arange(48)[None] % 72)
    change(folder, lambda tensors: tensors.update({
        name: torch.full_like(tensors[name], 1 / value if "global" in suffix else value)
        for name in tensors if name.endswith(suffix)
        for value in [largest[name.removesuffix(suffix)] / most]}))
    return folder


def exported(checkpoint: Path, folder: Path, target: str = "trt-native", dtype: str = "fp32", **options) -> Export:
    return export_onnx(checkpoint, folder, ExportOptions(target=target, dtype=dtype, capacity=48, activations="same",
                                                         **options))


def rounding(export: Export) -> list[QuantizedWeight]:
    assert export.manifest.quantization is not None
    assert export.manifest.quantization.activations == "same"
    return [weight for weight in export.manifest.quantization.weights if weight.inputs]


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint and its bundle."""
    folder = tmp_path_factory.mktemp("fp8")
    checkpoint = static(folder / "checkpoint", "ModelOpt FP8")
    return checkpoint, exported(checkpoint, folder / "bundle").folder


def largest(verdict, part: str) -> float:
    return max(kind.max_abs for case in verdict.cases if case.part == part for kind in case.kinds
               if kind.kind == "logits")


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


def changed(bundle: Path, folder: Path, graph: Callable[[onnx.ModelProto], None],
            manifest: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> Path:
    """A bundle whose graph and manifest were changed by someone; its weights are linked."""
    folder.mkdir()
    for file in bundle.iterdir():
        if file.name not in (MODEL, MANIFEST):
            (folder / file.name).hardlink_to(file)
    model = onnx.load(bundle / MODEL, load_external_data=False)
    graph(model)
    onnx.save(model, folder / MODEL)
    found = manifest(read_manifest(bundle))
    fact = FileFact((folder / MODEL).stat().st_size, file_sha256(folder / MODEL))
    (folder / MANIFEST).write_text(replace(found, files={**found.files, MODEL: fact}).to_json())
    return folder


def scaled(factor: float, which: str = "") -> Callable[[onnx.ModelProto], None]:
    """Scales of rounded inputs times a factor."""
    def do(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name.endswith("/input/scale") and which in tensor.name:
                value = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    return do


def dropped(model: onnx.ModelProto) -> None:
    """The input of one product as it is."""
    makers = {node.output[0]: node for node in model.graph.node}
    node = next(node for node in model.graph.node if node.op_type == "MatMul" and "down_proj" in node.name)
    node.input[0] = makers[makers[node.input[0]].input[0]].input[0]


def stated(factor: float) -> Callable[[Manifest], Manifest]:
    """A manifest that says another scale of every input; 0: that they are not rounded."""
    def do(manifest: Manifest) -> Manifest:
        assert manifest.quantization is not None
        weights = tuple(replace(weight, inputs=weight.inputs if factor else "", input_scale=factor * weight.input_scale,
                                inputs_reason=weight.inputs_reason if factor else "there is none")
                        for weight in manifest.quantization.weights)
        return replace(manifest, quantization=replace(manifest.quantization, weights=weights))
    return do


@pytest.mark.parametrize("graph", [scaled(2), scaled(0.5), scaled(1.001, "down_proj"), dropped])
def test_a_graph_that_rounds_otherwise_than_its_manifest_says_is_refused(fp8, tmp_path: Path, graph) -> None:
    """Twice the scale is nearly as good: e4m3 has the same digits in the octave above. So scales are compared."""
    with refused("E-BUNDLE-CLAIM", InvalidBundle) as refusal:
        validate(changed(fp8[1], tmp_path / "b", graph), fp8[0], steps=2)
    assert "down_proj" in refusal.error.what or "layers.0" in refusal.error.what


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_scales_that_are_not_the_checkpoints_are_refused(fp8, tmp_path: Path, factor: float) -> None:
    """Graph and manifest agree, and the checkpoint has others."""
    bundle = changed(fp8[1], tmp_path / "b", scaled(factor), stated(factor))
    with refused("E-BUNDLE-QUANTIZATION", InvalidBundle) as refusal:
        validate(bundle, fp8[0], steps=2)
    assert "the checkpoint or its calibration says" in refusal.error.what


@pytest.mark.parametrize("factor", [1 / 16, 2.0**16])
def test_a_scale_that_is_far_off_shows_in_the_numbers_as_shipped(fp8, tmp_path: Path, monkeypatch,
                                                                 factor: float) -> None:
    """Without the comparison of scales: too small a scale saturates, too large a one leaves few digits."""
    monkeypatch.setattr("gqa_export.validation.validate.check_claims", lambda *_: None)
    verdict = validate(changed(fp8[1], tmp_path / "b", scaled(factor)), fp8[0], steps=2)
    assert (verdict.export_exact, verdict.as_shipped) == (True, False)


def test_a_wrong_scale_of_the_weight_shows_in_the_numbers_that_are_exact(fp8, tmp_path: Path) -> None:
    """A hundredth, which is less than what rounding inputs costs."""
    def graph(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear" and "o_proj" in node.name)
        factor = onnx.numpy_helper.from_array(np.float32(1.01), "broken/factor")
        model.graph.initializer.append(factor)
        scale = onnx.helper.make_node("Mul", [node.input[1], factor.name], ["broken/scale"], "broken")
        model.graph.node.insert(0, scale)
        node.input[1] = "broken/scale"

    verdict = validate(changed(fp8[1], tmp_path / "b", graph), fp8[0], steps=2)
    assert (verdict.export_exact, verdict.as_shipped) == (False, True)


@contextmanager
def engine(bundle: Path, folder: Path, monkeypatch, state: Callable[[Manifest], Manifest] = lambda manifest: manifest,
           graph: Callable[[onnx.ModelProto], None] = lambda model: None) -> Iterator[Path]:
    """No engine runs here: inside, the graph of a bundle stands in for one, whose rounding cannot be left out. state:
    changes what its manifest says. graph: changes what is run."""
    stands_in = changed(bundle, folder.with_name(f"{folder.name}_graph"), graph)
    changed(bundle, folder, lambda model: None)
    manifest = read_manifest(folder)
    facts = EngineFacts("rtx", "1.7", (), "native", make_profiles(manifest, 4, 32), expected_aliases(manifest))
    (folder / ENGINE).write_bytes(b"opened by nobody")
    files = {**manifest.files, ENGINE: FileFact((folder / ENGINE).stat().st_size, file_sha256(folder / ENGINE))}
    (folder / MANIFEST).write_text(replace(state(manifest), engine=facts, files=files).to_json())
    with ExitStack() as stack:
        def load(*_):
            ran, where, target = runnable(stack, stands_in, manifest, "float32", [], lambda *_: None)
            return stack.enter_context(bundle_session(where, ran, "cpu", [], target))

        monkeypatch.setattr("gqa_export.validation.validate.load_engine", load)
        yield folder


def test_an_engine_is_judged_as_shipped_alone(fp8, tmp_path: Path, monkeypatch) -> None:
    with engine(fp8[1], tmp_path / "engine", monkeypatch) as folder:
        verdict = validate(folder, fp8[0], steps=2)
    assert verdict.passed, verdict.failure
    assert (verdict.export_exact, verdict.as_shipped, verdict.activations) == (None, True, "same")


def test_an_engine_that_rounds_more_than_it_says_is_wrong(fp8, tmp_path: Path, monkeypatch) -> None:
    """Exported with the option, and no weight has a scale for its inputs: nothing is to be rounded, and nothing is
    excused."""
    with engine(fp8[1], tmp_path / "engine", monkeypatch, stated(0)) as folder:
        verdict = validate(folder, fp8[0], steps=2)
    assert not verdict.passed
    assert (verdict.as_shipped, verdict.activations) == (None, "exact")
    assert {case.part for case in verdict.cases} == {""}


def test_an_engine_that_nothing_can_be_held_against_does_not_pass(fp8, tmp_path: Path, monkeypatch) -> None:
    """There is no room for the baseline, which alone rounds as the engine does."""
    with engine(fp8[1], tmp_path / "engine", monkeypatch) as folder:
        known = replace(open_reference(fp8[0], read_manifest(folder), "float32", []), eager=None)
        with refused("E-VALIDATE-MEMORY", NotCheckedHere) as refusal:
            validate(folder, fp8[0], steps=2, reference=known)
    assert "an engine cannot leave the rounding of inputs out" in refusal.error.what


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


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("plain")
    write_tiny("llama", folder / "checkpoint", num_hidden_layers=1)
    byte_tokenizer(folder / "checkpoint")
    (folder / "text.txt").write_text("".join(SENTENCES) * 8)
    return folder / "checkpoint", folder / "text.txt"


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


@pytest.fixture(scope="module")
def calibrated(plain, tmp_path_factory) -> Path:
    """A bundle of FP8 whose scales of inputs a text gave."""
    return exported(plain[0], tmp_path_factory.mktemp("calibrated") / "b", quantize="fp8", calibrate=plain[1]).folder


def all_scaled(bundle: Path, folder: Path, factor: float) -> Path:
    """A bundle whose graph, manifest and own record of the text agree on other scales of inputs."""
    data = importance_file(read_importance(bundle),
                           {name: factor * size for name, size in read_largest(bundle).items()})
    fact = FileFact(len(data), hashlib.sha256(data).hexdigest())

    def state(manifest: Manifest) -> Manifest:
        other = stated(factor)(manifest)
        return replace(other, files={**other.files, FILE: fact})

    changed(bundle, folder, scaled(factor), state)
    (folder / FILE).unlink()  # it is linked
    (folder / FILE).write_bytes(data)
    return folder


@pytest.mark.parametrize("factor", [1 / 1024, 0.5, 1.02])
def test_scales_that_a_bundle_alone_agrees_on_are_refused_beside_the_text(plain, calibrated, tmp_path: Path,
                                                                          factor: float) -> None:
    """The text is measured again: threads and bf16 move a scale by less than a hundredth."""
    with refused("E-BUNDLE-QUANTIZATION", InvalidBundle) as refusal:
        validate(all_scaled(calibrated, tmp_path / "b", factor), plain[0], steps=2,
                 loss=LossRequest(calibrate=plain[1]))
    assert "the checkpoint or its calibration says" in refusal.error.what


def test_inputs_that_are_cut_off_alike_in_pytorch_and_the_bundle_are_not_right(plain, calibrated, tmp_path: Path,
                                                                              ) -> None:
    """Without the text nothing tells which scales it gave. Both sides agree to six digits, and neither is the
    checkpoint's model: logits are off by more than the largest of them."""
    verdict = validate(all_scaled(calibrated, tmp_path / "b", 1 / 1024), plain[0], steps=2)
    assert (verdict.export_exact, verdict.as_shipped) == (True, False)
    assert any("tells nothing" in note and "--calibrate TEXT" in note for note in verdict.notes)
    assert "activations" in {case.logits.basis for case in verdict.cases if case.part == "as shipped" and case.rows}


def test_what_scales_were_held_against_is_told(plain, calibrated) -> None:
    """A note where it was the bundle's own record, none where the text was measured again."""
    for text, told in ((None, True), (plain[1], False)):
        verdict = validate(calibrated, plain[0], steps=2, loss=LossRequest(calibrate=text))
        assert verdict.passed, verdict.failure
        assert any("not held against the checkpoint" in note for note in verdict.notes) is told


def test_an_engines_cache_codes_are_counted_where_it_rounds_inputs_too(plain, tmp_path: Path, monkeypatch) -> None:
    """Rounding inputs moves 62 % of them in PyTorch too, so that 81 % may be others: a note says how little that tells.
    Scales that are a quarter off move more. Why outputs overflow is told as of any other engine."""
    bundle = exported(plain[0], tmp_path / "b", "trt-plugin", "fp16", quantize="fp8", calibrate=plain[1],
                      kv_cache="int8").folder

    def off(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name in ("key_scale", "value_scale"):
                    attribute.f *= 1.25

    monkeypatch.setattr("gqa_export.validation.parts.overflow_words", lambda *_: "layer 0 overflows")
    for name, graph in (("right", lambda model: None), ("wrong", off)):
        with engine(bundle, tmp_path / name, monkeypatch, graph=graph) as folder:
            verdict = validate(folder, plain[0], steps=2, loss=LossRequest(calibrate=plain[1]))
        codes = [kind for case in verdict.cases for kind in case.kinds if kind.kind == "codes"]
        assert len(codes) == len([case for case in verdict.cases if case.rows])
        assert verdict.passed is (name == "right"), verdict.failure
        assert all(kind.passed for kind in codes) is (name == "right")
        assert verdict.overflow == "layer 0 overflows"
        assert any("rounded inputs move many codes of the cache" in note for note in verdict.notes)


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
