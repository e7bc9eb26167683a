"""Engines whose cache holds codes: what TensorRT for RTX builds of them, and what is refused before it does."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from gqa_models import write_tiny
from refusal import refused
from small_text import SENTENCES, byte_tokenizer

import gqa_export as gqa
from gqa_export.bundle.manifest import MODEL, read_manifest
from gqa_export.engine.kernels import compile_kernels, wanted_variants
from gqa_export.errors import GqaExportError

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
@pytest.mark.parametrize(("codes", "capabilities"), [("int8", (80,)), ("fp8", (89, 120))])
def test_an_engine_keeps_codes_in_place(rtx, bundle, tmp_path, codes, capabilities) -> None:
    """TensorRT's network has inputs and outputs of the codes' type on the same memory (`inspect_build.check` holds them
    against the manifest), and nothing copies or converts them."""
    built = build(bundle(codes), tmp_path / "engine", capabilities)
    check_plugin(built, bundle(codes), 4, capabilities)
    manifest = read_manifest(built.folder)
    dtype = {"int8": "int8", "fp8": "float8_e4m3fn"}[codes]
    assert {fact.dtype for fact in manifest.inputs if "past_key_values" in fact.name} == {dtype}
    assert {fact.dtype for fact in manifest.outputs if "present" in fact.name} == {dtype}
    assert manifest.kv_cache == read_manifest(bundle(codes)).kv_cache
    assert (manifest.engine.plugin.version, manifest.engine.plugin.contract_version) == ("3", 2)


def test_fp8_for_a_gpu_that_does_not_convert_it_is_refused_by_its_capability(bundle) -> None:
    folder = bundle("fp8")
    manifest = read_manifest(folder)
    variants = wanted_variants(onnx.load(str(folder / MODEL), load_external_data=False), manifest.capacity,
                               manifest.dtype)
    assert {variant.cache for variant in variants} == {"fp8"}
    with refused("E-ENGINE-KERNEL-FP8", GqaExportError) as found:
        compile_kernels(variants, (80,), lambda *_: None)
    assert "needs compute capability 8.9, and 8.0" in found.error.what
