"""The table of targets: every row is whole, and a layer that does not fit is told why."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest

from gqa_export.errors import GqaExportError
from gqa_export.spec import AttentionSpec
from gqa_export.targets import TARGETS, get_target

LAYER = AttentionSpec(0, num_heads=8, kv_num_heads=2, head_size=64, value_head_size=64, scale=0.125)


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_every_row_knows_its_caches_interface_and_types(target):
    assert set(target.caches) <= {"growing", "static"}
    assert target.caches
    assert target.interface in ("mask", "lengths")
    assert target.dtypes
    assert target.ir_version <= 13
    assert target.cannot_hold(LAYER) == ""


@pytest.mark.parametrize("name", ["ort", "onnx", "portable"])
def test_every_target_of_onnx_runtime_has_its_module(name):
    assert find_spec(f"gqa_export.lowering.{get_target(name).dialect}") is not None
    assert get_target(name).runs_in_onnxruntime


def test_an_unknown_target_lists_the_known_ones():
    with pytest.raises(GqaExportError) as caught:
        get_target("tflite")
    assert all(name in caught.value.fix for name in TARGETS)


@pytest.mark.parametrize(("fact", "layer", "reason"), [
    ({"window": False}, {"window": 128}, "has no window and this layer sees 128 tokens"),
    ({"softcap": False}, {"softcap": 30.0}, "this layer caps them at 30"),
    ({"sinks": False}, {"sinks": True}, "has no attention sinks"),
    ({"value_head_size_differs": False}, {"value_head_size": 32}, "keys have 64 and its values 32"),
    ({"head_size_multiple": 48}, {}, "divisible by 48, not 64")])
def test_what_an_op_cannot_hold_is_said(fact, layer, reason):
    target = replace(TARGETS["portable"], **fact)
    assert reason in target.cannot_hold(replace(LAYER, **layer))
    assert TARGETS["portable"].cannot_hold(replace(LAYER, **layer)) == ""


def test_rotation_inside_asks_for_its_multiples():
    ort = TARGETS["ort"]
    assert ort.rotates(64, 64)
    assert ort.rotates(64, 16)
    assert not ort.rotates(24, 24)
    assert not ort.rotates(64, 24)
    assert not TARGETS["onnx"].rotates(64, 64)
