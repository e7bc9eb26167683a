"""Bundles that round activations: exact with that switched off, and as good as PyTorch that rounds by the same rule."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from gqa_models import write_tiny
from onnx import TensorProto, helper, numpy_helper

import gqa_export as gqa
from gqa_export.bundle.manifest import MODEL, read_manifest
from gqa_export.compare.case_verdict import Location
from gqa_export.compare.tolerance import CAP_PART, FACTOR, ROUNDED_FACTOR, tolerance
from gqa_export.report.console import details
from gqa_export.report.github import markdown
from gqa_export.report.html import page
from gqa_export.report.json_schema import text as json_text
from gqa_export.report.junit import text as junit_text
from gqa_export.report.outcome import Outcome
from gqa_export.runtime.ort.loading import import_onnxruntime, session_config
from gqa_export.validation.accuracy_level import at_level_zero, rounded, rounds_activations
from gqa_export.validation.refusals import judge_refusals
from gqa_export.validation.validate import validate

from .quantized_bundle import BLOCK, packed, quantize_bundle, quantize_checkpoint, rtn

STEPS = 4


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(the checkpoint, its bundle of target `onnx`, the checkpoint that the codes stand for)"""
    folder = tmp_path_factory.mktemp("plain")
    checkpoint = write_tiny("llama", folder / "checkpoint", num_hidden_layers=2)
    bundle = gqa.export(checkpoint, folder / "bundle", target="onnx", capacity=64)
    return checkpoint, bundle.folder, quantize_checkpoint(checkpoint, folder / "dequantized")


@pytest.fixture(scope="module")
def made(plain, tmp_path_factory):
    """make(level=..., stated=..., change=...) -> a quantized bundle."""
    def make(**options):
        return quantize_bundle(plain[1], plain[0], tmp_path_factory.mktemp("q") / "bundle", **options)
    return make


@pytest.fixture(scope="module")
def four(made):
    return made(level=4)


@pytest.fixture(scope="module")
def verdict(four, plain):
    return validate(four, plain[2], steps=STEPS)


def largest(verdict, part: str) -> float:
    return max(kind.max_abs for case in verdict.cases if case.part == part for kind in case.kinds
               if kind.kind == "logits")


@pytest.mark.parametrize(("columns", "block"), [(64, 16), (64, 32), (200, 32), (201, 16)])
def test_the_emulated_rule_is_onnxruntimes(columns, block):
    random = np.random.default_rng(columns + block)
    weight, values = random.normal(size=(24, columns)), random.normal(size=(5, columns)).astype(np.float32)
    values[1, :block] = 0
    values[2] *= 100
    padded = np.pad(weight, ((0, 0), (0, -columns % block))).reshape(24, -1, block)
    scale = (np.abs(padded).max(-1) / 7).astype(np.float32)
    codes = (np.clip(np.rint(padded / scale[..., None]), -8, 7) + 8).astype(np.uint8).reshape(24, -1)
    stored = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(24, -1, block // 2)
    weight = ((codes.reshape(padded.shape).astype(np.float64) - 8) * scale[..., None]).reshape(24, -1)[:, :columns]
    node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", bits=4, block_size=block,
                            K=columns, N=24, accuracy_level=4)
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, columns])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 24])],
                              [numpy_helper.from_array(stored, "b"), numpy_helper.from_array(scale, "s")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17),
                                                    helper.make_opsetid("com.microsoft", 1)], ir_version=8)
    got = import_onnxruntime().InferenceSession(model.SerializeToString()).run(None, {"x": values})[0]
    emulated = rounded(torch.from_numpy(values), block).double().numpy() @ weight.T
    plain = values.astype(np.float64) @ weight.T
    assert np.abs(got - emulated).max() < 1e-6 * np.abs(plain).max()
    assert np.abs(got - plain).max() > 1e-4 * np.abs(plain).max()


def test_the_rule_rounds_zero_to_zero_and_hides_no_nan():
    values = torch.zeros(1, 2 * BLOCK)
    values[0, BLOCK] = float("nan")
    assert torch.equal(rounded(values, BLOCK)[:, :BLOCK], torch.zeros(1, BLOCK))
    assert rounded(values, BLOCK)[:, BLOCK:].isnan().all()


@pytest.mark.whole_model
def test_two_verdicts_and_each_tells_its_own(verdict):
    assert verdict.passed, verdict.failure
    assert (verdict.activations, verdict.export_exact, verdict.as_shipped) == ("int8", True, True)
    assert {"export exact", "as shipped"} <= set(verdict.compared)
    exact, shipped = ({case.entry for case in verdict.cases if case.part == part}
                      for part in ("export exact", "as shipped"))
    assert exact == shipped
    assert len({case.name for case in verdict.cases}) == len(verdict.cases)
    assert largest(verdict, "export exact") < 1e-4 < 1e-3 < largest(verdict, "as shipped")
    for case in verdict.cases:
        for kind in case.kinds:
            if case.part == "as shipped" and kind.kind == "logits":
                assert kind.bound <= FACTOR * kind.same_dtype_baseline * 1.0001
                assert kind.same_dtype_baseline > 1e-3


@pytest.mark.whole_model
def test_reports_carry_both_verdicts_and_the_level(verdict):
    text = "\n".join(details(verdict))
    assert "export exact: passed" in text
    assert "as shipped: passed" in text
    assert "int8" in text
    run = Outcome(("b",), "c", (verdict,))
    for text in (page(run), markdown(run), junit_text(run)):
        assert "export exact" in text
        assert "rounded to int8" in text
    data = json.loads(json_text(run))
    assert (data["export_exact"], data["as_shipped"], data["activations"]) == (True, True, "int8")


@pytest.mark.whole_model
def test_a_bundle_that_rounds_nothing_has_one_verdict(made, plain):
    found = validate(made(level=0), plain[2], steps=2)
    assert found.passed
    assert (found.activations, found.export_exact, found.as_shipped) == ("exact", True, None)
    assert largest(found, "") < 1e-4
    wrong = next(case for case in found.cases if case.entry == "teacher_forced")
    location = Location("teacher_forced", 0, "logits", "logits", {}, 0.0, 1.0, 1.0, 0.0)
    worse = replace(wrong, kinds=tuple(replace(kind, first=location) for kind in wrong.kinds))
    different = replace(found, cases=tuple(worse if case is wrong else case for case in found.cases))
    for one, passed, word in ((found, True, "passed"), (different, False, "DIFFERENT")):
        run = Outcome(("b",), "c", (one,))
        data = json.loads(json_text(run))
        assert (data["export_exact"], data["as_shipped"]) == (passed, None)
        for text, between in (("\n".join(details(one)), ": "), (page(run), "</th><td>"), (markdown(run), ": ")):
            assert f"export exact{between}{word}" in text
            assert f"as shipped{between}" not in text
        assert f'name="export exact" value="{word}"' in junit_text(run)
        assert "export exact" in one.compared
    refusing = replace(next(case for case in found.cases if case.entry == "refusals"), kinds=tuple(
        replace(kind, first=location) for case in found.cases if case.entry == "refusals" for kind in case.kinds))
    others = tuple(refusing if case.entry == "refusals" else case for case in found.cases)
    assert replace(found, cases=others).export_exact, "calls that are not refused are no wrong numbers"
    assert replace(found, activations="").export_exact is None, "weights that are not quantized"


@pytest.mark.whole_model
@pytest.mark.parametrize("stated", ["int8", "exact"])
def test_level_4_where_0_was_promised_shows(stated, made, plain):
    """The manifest promises exact activations and the graph rounds them: the baseline rounds nothing, and it fails."""
    found = validate(made(level=4, stated=stated), plain[2], steps=2)
    assert found.export_exact
    assert found.as_shipped == (stated == "int8")
    assert found.passed == (stated == "int8")


@pytest.mark.whole_model
def test_the_strict_verdict_sees_what_rounding_would_hide(made, plain):
    """Scales of one matrix off by a thousandth: far below what int8 activations cost."""
    def change(arrays, _):
        arrays["scales"] = arrays["scales"] * np.float32(1 + 1e-3)

    found = validate(made(level=4, change=change), plain[2], steps=2)
    assert found.export_exact is False
    assert found.as_shipped
    assert "case shipped" not in found.failure


@pytest.mark.whole_model
def test_the_shipped_bundle_is_what_the_loss_and_the_refusals_are_of(four, plain, monkeypatch):
    import gqa_export.validation.validate as module

    seen = []
    def look(session):
        session.reset(1)
        seen.append(session.step(np.array([[5, 6, 7]])).logits)

    monkeypatch.setattr(module, "judge_refusals", lambda session, **_: look(session) or judge_refusals(session))
    monkeypatch.setattr(module, "measure_loss", lambda request, session, *_: look(session))
    validate(four, plain[2], steps=2)
    assert len(seen) == 2
    first, second = seen
    assert np.array_equal(first, second)
    with at_level_zero(four, read_manifest(four)) as (_, folder, count):
        exact = gqa.open_bundle(folder).session().step(np.array([[5, 6, 7]]))
    assert count == 14
    assert np.abs(first - exact).max() > 1e-3


@pytest.mark.whole_model
def test_the_bundle_on_disk_is_left_alone(four, plain):
    before = (four / MODEL).read_bytes()
    validate(four, plain[2], steps=2)
    assert (four / MODEL).read_bytes() == before


def test_bundles_compared_with_one_another_are_compared_exactly(four, made):
    [found] = gqa.cross_check([four, made(level=0)], steps=2)
    assert found.passed, found.failure


def test_what_rounds_is_read_from_the_graph_and_not_from_the_manifest(four, made):
    manifest = read_manifest(four)
    assert rounds_activations(four, replace(manifest, quantization=None))
    assert not rounds_activations(made(level=0), manifest)


def dequantizing(folder, levels):
    """A graph with DequantizeLinear + MatMul, as `onnx` and `portable` have it, and what two options make of it."""
    random = np.random.default_rng(2)
    codes, scale, _ = rtn(random.normal(size=(32, 64)))
    nodes = [helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["w"], axis=0, block_size=BLOCK),
             helper.make_node("MatMul", ["x", "w"], ["y"])]
    zero = np.full((64 // BLOCK, 32), 8, np.uint8)
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 32])],
        [helper.make_tensor("codes", TensorProto.UINT4, [64, 32], packed(codes.T.copy().reshape(64, 32)).tobytes(),
                            raw=True), numpy_helper.from_array(np.ascontiguousarray(scale.T), "scale"),
         helper.make_tensor("zero", TensorProto.UINT4, zero.shape, (zero[:, 0::2] | zero[:, 1::2] << 4).tobytes(),
                            raw=True)])
    path = folder / MODEL
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    values = random.normal(size=(3, 64)).astype(np.float32)
    found = []
    for config in levels:
        options = import_onnxruntime().SessionOptions()
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        found.append(import_onnxruntime().InferenceSession(str(path), options).run(None, {"x": values})[0])
    return found, values @ ((codes.T.astype(np.float64) - 8) * np.repeat(scale.T.astype(np.float64), BLOCK, 0))


def test_the_session_option_decides_whether_dequantized_products_round(four, tmp_path):
    manifest = read_manifest(four)
    exact = replace(manifest, quantization=replace(manifest.quantization, activations="exact"))
    levels = [session_config(manifest), session_config(exact)]
    (rounded_, plain_), expected = dequantizing(tmp_path, levels)
    assert np.abs(plain_ - expected).max() < 1e-5 < 1e-3 < np.abs(rounded_ - expected).max()
    assert rounds_activations(tmp_path, manifest)
    assert not rounds_activations(tmp_path, exact)


def test_a_baseline_that_rounds_is_not_capped_by_units_of_fp32():
    assert tolerance(0.01, 1.0, "float32").basis == "cap"
    assert tolerance(0.01, 1.0, "float32", True).bound == pytest.approx(FACTOR * 0.01)
    assert tolerance(0.03, 1.0, "float32", True).bound == CAP_PART


def test_what_rounding_does_to_pytorch_itself_is_allowed_to_a_bundle_as_shipped():
    found = tolerance(0.2, 1.0, "float32", True)
    assert (found.bound, found.basis) == (pytest.approx(ROUNDED_FACTOR * 0.2), "activations")
    assert tolerance(5.0, 1.0, "float32", True).bound == 1.0  # never more than the largest value of the reference
    assert tolerance(0.2, 1.0, "float32").basis == "cap"  # and never at level 0


@pytest.mark.parametrize("baseline", [np.inf, np.nan])
def test_a_baseline_that_is_not_finite_excuses_nothing(baseline):
    assert tolerance(baseline, 1.0, "float32", True).bound == CAP_PART
