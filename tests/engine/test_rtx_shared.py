"""Engines of a model whose last layers read other layers' caches: no tensor of their own, nothing copied."""

from __future__ import annotations

import pytest
from gqa_models import write_tiny

import gqa_export as gqa
from gqa_export.bundle.manifest import read_manifest

from .built import build, check, check_plugin

pytestmark = [pytest.mark.whole_model, pytest.mark.slow]


@pytest.mark.parametrize(("target", "capability"), [("trt-plugin", 89), ("trt-native", 80)])
def test_an_engine_reads_the_caches_of_the_owners_in_place(rtx, target, capability, tmp_path) -> None:
    checkpoint = write_tiny("gemma3n", tmp_path / "checkpoint")
    bundle = gqa.export(checkpoint, tmp_path / "b", target=target, dtype="fp16", capacity=96).folder
    assert [layer.owner for layer in read_manifest(bundle).spec.layers] == [None, None, 0, 1]
    built = build(bundle, tmp_path / "engine", (capability,))
    if target == "trt-plugin":  # append and combine; prefill and decode with and without a window
        check_plugin(built, bundle, 6, (capability,))
    else:
        check(built, bundle, "native", (capability,))
    assert len(built.facts.aliases) == 4
