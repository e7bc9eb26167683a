"""Layers with states of fixed size, from a checkpoint to a bundle that equals PyTorch, and on in onnxruntime-genai."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gqa_models.shrink import write_small

import gqa_export as gqa
from gqa_export.bundle.manifest import read_manifest
from gqa_export.exporting.genai_config import genai_config, misfit
from gqa_export.runtime.generate import generate
from gqa_export.runtime.ort.session import OrtSession

pytestmark = pytest.mark.whole_model

PROMPT = [5, 17, 33, 41, 8, 99, 7]


@pytest.fixture(scope="module", params=["qwen3_5_text", "lfm2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One family with linear attention and convolutions, one with convolutions alone."""
    return write_small(request.param, tmp_path_factory.mktemp("checkpoint") / request.param)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> gqa.Bundle:
    """Exported for ONNX Runtime, its cache in one buffer."""
    return gqa.export(checkpoint, tmp_path_factory.mktemp("bundle") / "ort", cache="static", capacity=96)


def test_logits_and_every_state_equal_pytorch(bundle: gqa.Bundle, checkpoint: Path) -> None:
    verdict = bundle.validate(checkpoint)
    assert verdict.passed, verdict.first
    assert "states" in verdict.compared
    spec = bundle.manifest.spec
    compared = {error.output for case in verdict.cases for error in case.outputs}
    assert {f"layer {state.layer} {state.name}" for state in spec.states} <= compared


def greedy(checkpoint: Path, count: int) -> list[int]:
    """What transformers generates."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    found = model.generate(torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return found[0, len(PROMPT):].tolist()  # type: ignore[no-any-return]


def test_the_session_generates_what_transformers_generates_also_in_pieces_and_in_a_batch(
        bundle: gqa.Bundle, checkpoint: Path) -> None:
    wanted = greedy(checkpoint, 32)
    session = OrtSession.load(bundle.folder)
    assert generate(session, [PROMPT, PROMPT[:3]], 32).tokens[0] == wanted
    session.reset(1)
    for token in PROMPT:  # a state that a reset does not clear would show here
        logits = session.step(np.array([[token]])).logits
    assert int(logits[0, -1].argmax()) == wanted[0]


def test_onnxruntime_genai_generates_the_same(bundle: gqa.Bundle, checkpoint: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    wanted = greedy(checkpoint, 32)
    parameters = og.GeneratorParams(model := og.Model(str(bundle.folder)))
    parameters.set_search_options(max_length=len(PROMPT) + 32, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([PROMPT], np.int32))
    found: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == wanted[: len(found)]
    assert len(found) == 32 or found[-1] in (bundle.manifest.tokens.get("eos") or [])


def test_the_genai_config_names_the_states(bundle: gqa.Bundle) -> None:
    manifest = read_manifest(bundle.folder)
    assert misfit(manifest) == ""
    decoder = genai_config(manifest)["model"]["decoder"]
    kinds = {state.kind for state in manifest.spec.states}
    assert {f"past_{kind}_names" for kind in kinds} <= set(decoder["inputs"])
    assert decoder["inputs"]["past_conv_names"] == "past_key_values.%d.conv_state"
    assert decoder["outputs"]["present_conv_names"] == "present.%d.conv_state"
    assert decoder["num_hidden_layers"] == 5
