"""Attention in chunks of positions, from a checkpoint to bundles that equal PyTorch past several ends of chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
from evidence.mutations.mutation import break_bundle
from evidence.mutations.of_chunks import CHUNK_MUTATIONS
from gqa_models import write_tiny
from refusal import refused

import gqa_export as gqa
from gqa_export.api import inspect
from gqa_export.errors import UnsupportedModel
from gqa_export.validation.validate import validate

pytestmark = pytest.mark.whole_model

CHUNK = 4
"""positions of a chunk in the tiny model"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers with chunks of four positions, one without."""
    return write_tiny("llama4", tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize(("target", "cache"), [("ort", "static"), ("onnx", "growing"), ("portable", "growing")])
def test_chunks_are_held_and_equal_pytorch(checkpoint: Path, tmp_path: Path, target: str, cache: str) -> None:
    bundle = gqa.export(checkpoint, tmp_path / "bundle", target=target, cache=cache, capacity=32)
    layers = bundle.manifest.spec.layers
    assert [layer.chunk for layer in layers] == [CHUNK, CHUNK, CHUNK, 0]
    assert {fallback.layer for fallback in bundle.manifest.fallbacks} == ({0, 1, 2} if target == "ort" else set())
    verdict = validate(bundle.folder, checkpoint, steps=8, provider="cpu")
    assert verdict.passed, verdict.first
    longest = next(case for case in verdict.cases if case.name == "teacher_forced")
    assert "past the window of 8" in longest.purpose  # the end of the second chunk


@pytest.mark.parametrize("damage", CHUNK_MUTATIONS[::3], ids=lambda damage: damage.name)
def test_damage_to_chunks_is_caught_by_the_quick_level(damaged: Path, checkpoint: Path, tmp_path: Path,
                                                       damage: object) -> None:
    broken = break_bundle(damaged, tmp_path / "broken", damage.change)  # type: ignore[attr-defined]
    verdict = validate(broken, checkpoint, steps=2, provider="cpu", check_hashes=False)
    assert not verdict.passed


@pytest.fixture(scope="module")
def damaged(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound bundle, copies of which are broken."""
    return gqa.export(checkpoint, tmp_path_factory.mktemp("sound") / "bundle", target="ort", capacity=32).folder


@pytest.mark.parametrize("target", ["trt-native", "trt-plugin"])
def test_tensorrt_targets_refuse_chunks_by_name_and_take_a_cache_of_one(checkpoint: Path, tmp_path: Path,
                                                                       target: str) -> None:
    with refused("E-TARGET-LAYER", UnsupportedModel) as refusal:
        gqa.export(checkpoint, tmp_path / "bundle", target=target, capacity=32)
    assert "attention in chunks" in refusal.error.what
    assert f"--capacity {CHUNK} or less" in refusal.error.fix
    assert not list(tmp_path.iterdir())


def test_inspect_shows_the_chunks_of_a_checkpoint(checkpoint: Path) -> None:
    from gqa_export.cli.inspect import attention_table

    table = "\n".join(attention_table(inspect(checkpoint).groups))
    assert f"chunks of {CHUNK}" in table
