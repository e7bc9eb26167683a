"""Every kind of damage to a state of fixed size is caught, by the quick level already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evidence.mutations.mutation import break_bundle
from evidence.mutations.of_states import STATE_MUTATIONS
from gqa_models.shrink import write_small

import gqa_export as gqa
from gqa_export.bundle.manifest import read_manifest
from gqa_export.validation.reference import open_reference
from gqa_export.validation.validate import validate

pytestmark = pytest.mark.whole_model


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A checkpoint with linear attention and convolutions, its bundle, and PyTorch opened for it."""
    checkpoint = write_small("qwen3_5_text", tmp_path_factory.mktemp("checkpoint"))
    folder = gqa.export(checkpoint, tmp_path_factory.mktemp("bundle") / "ort", target="ort", capacity=96).folder
    return checkpoint, folder, open_reference(checkpoint, read_manifest(folder), "float32", [])


@pytest.mark.parametrize("damage", STATE_MUTATIONS, ids=lambda damage: damage.name)
def test_damage_to_a_state_is_caught_by_the_quick_level(sound: tuple[Path, Path, Any], tmp_path: Path,
                                                        damage: Any) -> None:
    checkpoint, folder, reference = sound
    broken = break_bundle(folder, tmp_path / "broken", damage.change)
    verdict = validate(broken, checkpoint, steps=8, provider="cpu", check_hashes=False, reference=reference)
    assert not verdict.passed


def test_the_bundle_passes_as_long_as_nothing_is_broken(sound: tuple[Path, Path, Any], tmp_path: Path) -> None:
    checkpoint, folder, reference = sound
    whole = break_bundle(folder, tmp_path / "whole", lambda broken: None)
    verdict = validate(whole, checkpoint, steps=8, provider="cpu", check_hashes=False, reference=reference)
    assert verdict.passed, verdict.first
