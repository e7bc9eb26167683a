"""Scales of rounded inputs that are wrong, in the graph, the manifest, the record of the text or all of them, are
found: held against one another, the text and the checkpoint, or by numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from refusal import refused

from gqa_export.bundle.manifest import Manifest
from gqa_export.errors import InvalidBundle
from gqa_export.quantized.input_codes import NO_SCALE
from gqa_export.validation.loss import LossRequest
from gqa_export.validation.validate import validate

from .rounded_bundles import all_scaled, changed, dropped, scaled, stated

pytestmark = pytest.mark.whole_model


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


@pytest.mark.parametrize("factor", [1 / 1024, 0.5, 1.02])
def test_scales_that_a_bundle_alone_agrees_on_are_refused_beside_the_text(plain, calibrated, tmp_path: Path,
                                                                          factor: float) -> None:
    """The text is measured again: threads and bf16 move a scale by less than a hundredth."""
    with refused("E-BUNDLE-QUANTIZATION", InvalidBundle) as refusal:
        validate(all_scaled(calibrated, tmp_path / "b", factor), plain[0], steps=2,
                 loss=LossRequest(calibrate=plain[1]))
    assert "the checkpoint or its calibration says" in refusal.error.what


def test_what_scales_were_held_against_is_told(plain, calibrated) -> None:
    """A note where it was the bundle's own record, none where the text was measured again."""
    for text, told in ((None, True), (plain[1], False)):
        verdict = validate(calibrated, plain[0], steps=2, loss=LossRequest(calibrate=text))
        assert verdict.passed, verdict.failure
        assert any("not held against the checkpoint" in note for note in verdict.notes) is told


def test_inputs_that_are_cut_off_alike_in_pytorch_and_the_bundle_are_not_right(plain, calibrated, tmp_path: Path,
                                                                              ) -> None:
    """Without the text nothing tells which scales it gave. Both sides agree to six digits, and neither is the
    checkpoint's model: logits are off by more than the largest of them."""
    verdict = validate(all_scaled(calibrated, tmp_path / "b", 1 / 1024), plain[0], steps=2)
    assert (verdict.export_exact, verdict.as_shipped) == (True, False)
    assert any("tells nothing" in note and "--calibrate TEXT" in note for note in verdict.notes)
    assert "activations" in {case.logits.basis for case in verdict.cases if case.part == "as shipped" and case.rows}


@pytest.mark.parametrize("of", ["the checkpoint", "a text"])
def test_a_rounding_that_graph_and_manifest_leave_out_alike_is_refused(fp8, plain, calibrated, tmp_path: Path,
                                                                       of: str) -> None:
    """Such a bundle is nearer to the reference, and not what was asked for. The reason that it gives is not true."""
    bundle, checkpoint = (fp8[1], fp8[0]) if of == "the checkpoint" else (calibrated, plain[0])

    def without(manifest: Manifest) -> Manifest:
        assert manifest.quantization is not None
        weights = tuple(replace(weight, inputs="", input_scale=0.0, inputs_reason=NO_SCALE)
                        if "down_proj" in weight.name else weight for weight in manifest.quantization.weights)
        return replace(manifest, quantization=replace(manifest.quantization, weights=weights))

    with refused("E-BUNDLE-QUANTIZATION", InvalidBundle) as refusal:
        validate(changed(bundle, tmp_path / "b", dropped, without), checkpoint, steps=2)
    assert "layers.0.mlp.down_proj.weight do not round their inputs (there is no static scale" in refusal.error.what


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
