"""Every kind of damage at the seam of a ring is caught, by the quick level already, and by the cases that pass it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evidence.mutations.mutation import NotHere, break_bundle
from evidence.mutations.of_rings import RING_MUTATIONS
from gqa_models import write_tiny

import gqa_export as gqa
from gqa_export.bundle.manifest import read_manifest
from gqa_export.compare.cases import Plan
from gqa_export.compare.setting import Setting
from gqa_export.compare.suite import plan_suite
from gqa_export.validation.reference import open_reference
from gqa_export.validation.validate import validate

pytestmark = pytest.mark.whole_model
SOUND = "nothing is broken"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A checkpoint with windowed layers and one without, its bundle with rings of 21 slots, and PyTorch opened."""
    checkpoint = write_tiny("gpt_oss", tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=2)
    folder = gqa.export(checkpoint, tmp_path_factory.mktemp("bundle") / "portable", target="portable", capacity=96,
                        window_cache="small", prompt_chunk=5).folder
    return checkpoint, folder, open_reference(checkpoint, read_manifest(folder), "float32", [])


@pytest.fixture
def rings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the quick level only the case at the seam is run: it is the one that must catch the damage."""
    def cut(setting: Setting, level: str) -> Plan:
        plan = plan_suite(setting, level)
        return replace(plan, cases=tuple(case for case in plan.cases if case.name == "ring 21"))

    monkeypatch.setattr("gqa_export.validation.validate.plan_suite", cut)


@pytest.mark.parametrize("damage", [*RING_MUTATIONS, None], ids=lambda damage: damage.name if damage else SOUND)
@pytest.mark.usefixtures("rings_alone")
def test_damage_to_a_ring_is_caught_by_the_quick_level(sound: tuple[Path, Path, Any], tmp_path: Path,
                                                       damage: Any) -> None:
    checkpoint, folder, reference = sound
    broken = break_bundle(folder, tmp_path / "broken", damage.change if damage else lambda broken: None)
    verdict = validate(broken, checkpoint, steps=2, provider="cpu", check_hashes=False, reference=reference)
    assert {case.name: case.passed for case in verdict.cases} == {"ring 21": damage is None, "refusals": True}


def test_a_bundle_with_rings_passes_the_full_level(sound: tuple[Path, Path, Any]) -> None:
    checkpoint, folder, reference = sound
    verdict = validate(folder, checkpoint, level="full", steps=2, provider="cpu", reference=reference)
    assert verdict.passed, verdict.first
    assert {"ring 21", "ring 21 x 4", "window 16 x 4", "full_capacity"} <= {case.name for case in verdict.cases}


def test_a_graph_without_a_ring_has_nothing_of_it_to_break(sound: tuple[Path, Path, Any], tmp_path: Path) -> None:
    checkpoint, _, _ = sound
    whole = gqa.export(checkpoint, tmp_path / "whole", target="portable", cache="static", capacity=96).folder
    for damage in RING_MUTATIONS:
        with pytest.raises(NotHere):
            break_bundle(whole, tmp_path / damage.name, damage.change)
