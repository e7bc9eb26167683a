"""Engines of small models with TensorRT's own attention."""

from __future__ import annotations

import pytest

from gqa_export.bundle.manifest import read_manifest
from gqa_export.engine.build import EngineOptions, build_engine

from .built import PROMPT, build, check

pytestmark = pytest.mark.whole_model

NATIVE = [("gemma3", "fp16"), ("qwen3", "bf16"), ("phi3", "fp16"), ("llama_mha 9", "fp16"), ("llama_mqa", "fp16")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), NATIVE)
def test_an_engine_with_tensorrt_s_own_attention(rtx, tiny_bundle, tmp_path, name: str, dtype: str) -> None:
    bundle = tiny_bundle(name, "native", dtype)
    built = build(bundle, tmp_path / "engine")
    check(built, bundle, "native")
    assert built.facts.plugin is None
    assert built.facts.build["attention_layers"] == len(built.manifest.spec.layers)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("llama", "fp32"), ("llama_mha 3", "fp16")])
def test_native_attention_without_a_kernel_of_its_own_is_taken_apart_and_says_so(rtx, tiny_bundle, tmp_path, name: str,
                                                                                dtype: str) -> None:
    built = build(tiny_bundle(name, "native", dtype), tmp_path / "engine")
    check(built, tiny_bundle(name, "native", dtype), "native")
    assert built.facts.decomposed
    assert read_manifest(built.folder).engine.decomposed
    assert "--attention plugin" in built.notes[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_bf16_engine_for_one_sequence_at_a_time_is_built(rtx, tiny_bundle, tmp_path, name: str) -> None:
    """Which is the default, of two layers with one mask and with two: TensorRT for RTX did not build what others
    build."""
    options = EngineOptions(capabilities=("8.0",), max_prompt=PROMPT)
    facts = build_engine(tiny_bundle(name, "native", "bf16"), tmp_path / "engine", options).facts
    assert facts.max_batch == 1
    assert facts.build["attention_layers"] == 2
    assert not facts.decomposed
