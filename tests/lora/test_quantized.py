"""LoRA beside quantized weights: the adapter's two products stay in floats, whatever the weight is held as."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gqa_models import write_tiny
from refusal import refused

import gqa_export as gqa
from gqa_export.bundle.manifest import MANIFEST, MODEL, FileFact
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import GqaExportError
from gqa_export.exporting.adapters import refuse_quantized_adapters
from gqa_export.files.sha256 import file_sha256

from .adapters import write_adapter

CAPACITY = 48
MODULES = ["q_proj", "v_proj", "down_proj", "lm_head"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(checkpoint, {adapter's name: folder})."""
    place = tmp_path_factory.mktemp("llama")
    checkpoint = write_tiny("llama", place / "checkpoint", num_hidden_layers=2)
    model = load_model(open_checkpoint(checkpoint), "float32")
    return checkpoint, {"poet": write_adapter(place / "poet", model, MODULES, seed=1),
                        "clerk": write_adapter(place / "clerk", model, ["o_proj", "q_proj"], seed=2, rank=3, alpha=1)}


@pytest.mark.parametrize("options", [
    {"quantize": "int8"}, {"quantize": "int4", "target": "onnx", "activations": "exact"}],
    ids=["as shipped", "in standard operators"])
def test_a_bundle_of_codes_passes_the_suite_with_an_adapter(made, tmp_path, options) -> None:
    checkpoint, adapters = made
    bundle = gqa.export(checkpoint, tmp_path / "bundle", capacity=CAPACITY, lora=list(adapters.values()), **options)
    assert {weight.bits for weight in bundle.manifest.quantization.weights} <= {4, 8}
    verdict = bundle.validate(checkpoint, lora=adapters["poet"], steps=2)
    assert verdict.passed, verdict.failure


def test_the_base_model_of_codes_stays_itself_bit_for_bit_and_an_adapter_changes_it(made, tmp_path) -> None:
    checkpoint, adapters = made
    plain = gqa.export(checkpoint, tmp_path / "plain", capacity=CAPACITY, quantize="int4").session(provider="cpu")
    session = gqa.export(checkpoint, tmp_path / "bundle", capacity=CAPACITY, quantize="int4",
                         lora=list(adapters.values())).session(provider="cpu")
    ids = np.arange(3, 12)[None]
    base = session.step(ids)
    np.testing.assert_array_equal(base, plain.step(ids))
    answers = []
    for name in ("poet", "clerk", None, "poet"):
        session.use_adapter(name)
        answers.append(session.step(ids))
    np.testing.assert_array_equal(answers[2], base)
    np.testing.assert_array_equal(answers[3], answers[0])
    assert min(np.abs(answers[0] - base).max(), np.abs(answers[0] - answers[1]).max()) > 0.1


def test_a_merged_adapter_is_quantized_with_the_weights(made, tmp_path) -> None:
    checkpoint, adapters = made
    bundle = gqa.export(checkpoint, tmp_path / "bundle", capacity=CAPACITY, quantize="int8", activations="exact",
                        merge_lora=adapters["poet"])
    verdict = bundle.validate(checkpoint, lora=adapters["poet"], steps=2)
    assert verdict.passed, verdict.failure


def test_an_adapter_whose_products_are_lost_beside_codes_is_caught(made, tmp_path) -> None:
    import onnx

    checkpoint, adapters = made
    bundle = gqa.export(checkpoint, tmp_path / "bundle", capacity=CAPACITY, quantize="int8", activations="exact",
                        lora=[adapters["poet"]])
    path = bundle.folder / MODEL
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.name.startswith("model.layers.1.mlp.down_proj") and node.name.endswith(".lora/Add_0"):
            node.op_type = "Sub"
    onnx.save(model, path)
    files = {**bundle.manifest.files, MODEL: FileFact(path.stat().st_size, file_sha256(path))}
    (bundle.folder / MANIFEST).write_text(replace(bundle.manifest, files=files).to_json())
    assert not gqa.open_bundle(bundle.folder).validate(checkpoint, lora=adapters["poet"], steps=2).passed


def test_a_checkpoint_that_is_stored_quantized_is_refused_by_name() -> None:
    with refused("E-OPTION-LORA-QUANTIZED", GqaExportError):
        refuse_quantized_adapters(True)
    refuse_quantized_adapters(False)
