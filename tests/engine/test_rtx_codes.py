"""Engines whose cache holds codes: what TensorRT for RTX builds of them, and what is refused before it does."""

from __future__ import annotations

from pathlib import Path

import pytest
from gqa_models import write_tiny
from small_text import SENTENCES, byte_tokenizer

import gqa_export as gqa
from gqa_export.bundle.manifest import read_manifest

from .built import build, check_plugin

pytestmark = pytest.mark.whole_model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A tiny Llama of two layers whose cache holds codes of a type."""
    made: dict[str, Path] = {}

    def get(codes: str) -> Path:
        if codes not in made:
            folder = tmp_path_factory.mktemp(codes)
            checkpoint = write_tiny("llama", folder / "checkpoint", num_hidden_layers=2)
            byte_tokenizer(checkpoint)
            (folder / "text.txt").write_text("".join(SENTENCES))
            made[codes] = gqa.export(checkpoint, folder / "bundle", target="trt-plugin", dtype="fp16", capacity=96,
                                     kv_cache=codes, calibrate=folder / "text.txt").folder
        return made[codes]

    return get


@pytest.mark.slow
def test_an_engine_keeps_int8_codes_in_place(rtx, bundle, tmp_path) -> None:
    """TensorRT's network has int8 inputs and outputs on the same memory (`inspect_build.check` holds their types
    against the manifest), and nothing copies or converts them."""
    built = build(bundle("int8"), tmp_path / "engine")
    check_plugin(built, bundle("int8"), variants=4)
    manifest = read_manifest(built.folder)
    assert {fact.dtype for fact in manifest.inputs if "past_key_values" in fact.name} == {"int8"}
    assert {fact.dtype for fact in manifest.outputs if "present" in fact.name} == {"int8"}
    assert manifest.kv_cache == read_manifest(bundle("int8")).kv_cache
    assert b"gqa-cubins 1\n" in (built.folder / manifest.engine.file).read_bytes()
    assert (manifest.engine.plugin.version, manifest.engine.plugin.contract_version) == ("3", 2)
