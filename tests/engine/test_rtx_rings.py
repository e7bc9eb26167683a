"""An engine whose windowed layers keep rings: what TensorRT builds of them, and what is refused before it does."""

from __future__ import annotations

from pathlib import Path

import pytest
from gqa_models import write_tiny
from refusal import refused

import gqa_export as gqa
from gqa_export.bundle.manifest import read_manifest
from gqa_export.engine.profiles import make_profiles
from gqa_export.errors import GqaExportError

from .built import PROMPT, build, check_plugin
from .conftest import ALL, WINDOW

pytestmark = pytest.mark.whole_model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A tiny Gemma 3 with one layer of each kind; the windowed one keeps 16 + 32 slots of a capacity of 96."""
    checkpoint = write_tiny("gemma3", tmp_path_factory.mktemp("gemma3"), num_hidden_layers=2, layer_types=[WINDOW, ALL])
    return gqa.export(checkpoint, tmp_path_factory.mktemp("bundle") / "b", target="trt-plugin", dtype="fp16",
                      capacity=96, window_cache="small", prompt_chunk=PROMPT).folder


@pytest.mark.slow
def test_an_engine_keeps_rings_in_place_with_kernels_of_their_own(rtx, bundle, tmp_path) -> None:
    built = build(bundle, tmp_path / "engine", (120,))
    # append, prefill, decode and combine of both kinds of layer
    check_plugin(built, bundle, 8, (120,))
    shapes = built.facts.profiles[0].shapes
    assert [shapes[f"past_key_values.{layer}.key"][2][2] for layer in (0, 1)] == [48, 96]
    assert read_manifest(built.folder).window_cache == read_manifest(bundle).window_cache


def test_a_prompt_at_once_is_no_longer_than_the_rings_take(bundle) -> None:
    manifest = read_manifest(bundle)
    assert make_profiles(manifest, 1, 0)[1].shapes["input_ids"][2] == (1, PROMPT)
    assert make_profiles(manifest, 1, 5)[1].shapes["input_ids"][2] == (1, 5)
    with refused("E-ENGINE-PROMPT", GqaExportError):
        make_profiles(manifest, 1, PROMPT + 1)
