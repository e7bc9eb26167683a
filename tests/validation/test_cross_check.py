"""Bundles of one checkpoint compared among each other, without PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from evidence.mutations.kinds import scale_wrong, window_longer
from evidence.mutations.mutation import break_bundle
from gqa_models import write_tiny
from refusal import refused

from gqa_export.bundle.engine_facts import EngineFacts
from gqa_export.bundle.manifest import MANIFEST, Manifest, read_manifest
from gqa_export.bundle.quantization import Quantization, QuantizedWeight
from gqa_export.errors import InvalidBundle
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.spec import ModelSpec
from gqa_export.validation.cross_check import cross_check
from gqa_export.validation.parts import rounds_for_good

pytestmark = pytest.mark.whole_model

STEPS = 4


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    """Three bundles of one tiny checkpoint."""
    checkpoint = write_tiny("mistral", tmp_path_factory.mktemp("ck"))
    folder, made = tmp_path_factory.mktemp("b"), {"checkpoint": checkpoint}
    for name, target, cache in (("ort", "ort", "growing"), ("static", "ort", "static"),
                                ("portable", "portable", "growing")):
        made[name] = folder / name
        export_onnx(checkpoint, made[name], ExportOptions(target=target, cache=cache, capacity=128, dtype="fp32"))
    return made


def test_growing_equals_static_and_one_target_another(bundles):
    verdicts = cross_check([bundles["ort"], bundles["static"], bundles["portable"]], steps=STEPS)
    assert [Path(verdict.bundle).name for verdict in verdicts] == ["static", "portable"]
    for verdict in verdicts:
        assert verdict.passed, str(verdict.first)
        assert Path(verdict.against).name == "ort"
        names = {case.name for case in verdict.cases}
        assert {"teacher_forced", "ragged", "garbage_tail", "last_slots", "refusals"} <= names


@pytest.mark.parametrize("change", [scale_wrong])
def test_the_odd_one_out_differs(bundles, tmp_path, change):
    odd = break_bundle(bundles["portable"], tmp_path / "odd", change)
    manifest = read_manifest(odd)
    honest = read_manifest(bundles["ort"]).spec
    # a graph whose attribute and manifest lie alike is told by the other bundle's manifest
    with refused("E-VALIDATE-LAYERS", InvalidBundle) as refusal:
        cross_check([bundles["ort"], odd], steps=STEPS)
    assert "layer 1: scale" in refusal.error.what
    assert manifest.spec != honest


def test_a_wrong_weight_shows_between_bundles(bundles, tmp_path):
    from evidence.mutations.of_weights import weight_row

    odd = break_bundle(bundles["static"], tmp_path / "odd", weight_row)
    (verdict,) = cross_check([bundles["portable"], odd], steps=STEPS)
    assert verdict.exit_code == 1
    assert verdict.first is not None
    assert verdict.first.output == "layer 2 key"


def test_bundles_of_different_models_are_refused_by_what_tells_them_apart(bundles, tmp_path):
    odd = break_bundle(bundles["ort"], tmp_path / "odd", window_longer)
    with refused("E-VALIDATE-LAYERS", InvalidBundle) as refusal:
        cross_check([bundles["ort"], odd])
    assert "layer 1: window is 16 and 17" in refusal.error.what
    manifest = read_manifest(odd)
    (odd / MANIFEST).write_text(replace(manifest, spec=replace(manifest.spec, model_type="llama")).to_json())
    with refused("E-VALIDATE-MODELS", InvalidBundle) as refusal:
        cross_check([bundles["ort"], odd])
    assert "model_type is mistral and llama" in refusal.error.what


def test_the_command_takes_several_bundles_without_a_checkpoint(bundles, program):
    done = program("validate", bundles["ort"], bundles["static"], "--steps", STEPS)
    assert done.returncode == 0, done.stderr
    assert "PASSED" in done.stdout


def test_one_bundle_without_a_checkpoint_is_refused(bundles, program):
    done = program("validate", bundles["ort"])
    assert done.returncode == 2
    assert "--against" in done.stderr


@pytest.mark.parametrize(("engine", "inputs"), [(True, "e4m3"), (False, "e4m3"), (True, "")])
def test_an_engine_alone_rounds_inputs_for_good(engine: bool, inputs: str) -> None:
    """Of a graph the rounding is left out, so that an engine would differ from the very bundle that it was built of."""
    weight = QuantizedWeight("a", "FP8", 8, 64, True, "DequantizeLinear", 1, kind="e4m3", inputs=inputs,
                             input_scale=0.5 if inputs else 0.0)
    facts = EngineFacts("rtx", "1.7", (), "native", (), {}) if engine else None
    manifest = Manifest("trt-native", "float16", "static", 8, "last", "copy", ModelSpec("x", "", 5, 6, 8, "", ()), (),
                        (), engine=facts, quantization=Quantization("keep", "same", (weight,)))
    assert rounds_for_good(manifest) is (engine and bool(inputs))
