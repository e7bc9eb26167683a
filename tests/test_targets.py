"""The table of targets: every row is whole, and a layer that does not fit is told why."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
from refusal import refused

from gqa_export.errors import UnsupportedModel
from gqa_export.spec import AttentionSpec, StateSpec
from gqa_export.target_refusals import refuse_layers, refuse_options
from gqa_export.targets import TARGETS, by_reason, get_target, layers_label, reasons_against

LAYER = AttentionSpec(0, num_heads=8, kv_num_heads=2, head_size=64, value_head_size=64, scale=0.125)


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_every_row_knows_its_caches_interface_and_types(target):
    assert set(target.caches) <= {"growing", "static"}
    assert target.caches
    assert target.interface in ("mask", "lengths")
    assert target.dtypes
    assert target.ir_version <= 13
    assert target.cannot_hold(LAYER) == []


@pytest.mark.parametrize("name", ["ort", "onnx", "portable"])
def test_every_target_of_onnx_runtime_has_its_module(name):
    assert find_spec(f"gqa_export.lowering.{get_target(name).dialect}") is not None
    assert get_target(name).runs_in_onnxruntime


def test_an_unknown_target_lists_the_known_ones():
    with refused("E-TARGET-NAME") as refusal:
        get_target("tflite")
    assert all(name in refusal.error.fix for name in TARGETS)


@pytest.mark.parametrize(("fact", "layer", "reason"), [
    ({"window": False}, {"window": 128}, "has no window and this layer sees 128 tokens"),
    ({"softcap": False}, {"softcap": 30.0}, "this layer caps them at 30"),
    ({"sinks": False}, {"sinks": True}, "has no attention sinks"),
    ({"value_head_size_differs": False}, {"value_head_size": 32}, "keys have 64 and its values 32"),
    ({"head_size_multiple": 48}, {}, "divisible by 48, not 64")])
def test_what_an_op_cannot_hold_is_said(fact, layer, reason):
    target = replace(TARGETS["portable"], **fact)
    (found,) = target.cannot_hold(replace(LAYER, **layer))
    assert reason in found
    assert TARGETS["portable"].cannot_hold(replace(LAYER, **layer)) == []


def test_every_reason_against_a_layer_is_given():
    target = replace(TARGETS["portable"], window=False, softcap=False, sinks=False, head_size_most=32,
                     value_head_size_differs=False)
    layer = replace(LAYER, window=9, softcap=2.0, sinks=True, value_head_size=16)
    reasons = target.cannot_hold(layer)
    assert len(reasons) == len(set(reasons)) == 5
    for word in ("window", "cap", "sinks", "one head size", "up to 32"):
        assert sum(word in reason for reason in reasons) == 1, word


def test_each_reason_stands_once_with_all_the_layers_it_concerns():
    layers = [replace(LAYER, layer=number, softcap=5.0, sinks=number % 2 == 0) for number in range(5)]
    assert reasons_against(layers, TARGETS["trt-native"]) == [
        "layers 0-4: Attention cannot be relied on to cap scores, and this layer caps them at 5",
        "layers 0, 2, 4: Attention has no attention sinks"]
    with refused("E-TARGET-LAYER", UnsupportedModel) as refusal:
        refuse_layers(layers, TARGETS["trt-native"])
    assert "layers 0-4" in refusal.error.what
    assert "layers 0, 2, 4" in refusal.error.what
    assert refusal.error.fix == "use --target trt-plugin"
    refuse_layers(layers, TARGETS["onnx"])  # it has a fallback


@pytest.mark.parametrize(("numbers", "label"), [([3], "layer 3"), ([0, 1], "layers 0-1"),
                                                ([5, 0, 2, 1], "layers 0-2, 5"), ([1, 3, 5, 6], "layers 1, 3, 5-6")])
def test_layer_numbers_are_joined_to_ranges(numbers, label):
    assert layers_label(numbers) == label


def test_reasons_keep_the_order_in_which_they_appear():
    assert by_reason([(2, "b"), (0, "a"), (1, "b")]) == ["layers 1-2: b", "layer 0: a"]


def test_all_options_that_a_target_lacks_are_refused_at_once():
    refuse_options(TARGETS["trt-plugin"], "static", "last")
    with refused("E-TARGET-OPTION") as refusal:
        refuse_options(TARGETS["trt-plugin"], "growing", "all")
    assert refusal.error.where == "--cache, --logits"
    assert refusal.error.fix == "use --cache static --logits last"


def test_rotation_inside_asks_for_its_multiples():
    ort = TARGETS["ort"]
    assert ort.rotates(64, 64)
    assert ort.rotates(64, 16)
    assert not ort.rotates(24, 24)
    assert not ort.rotates(64, 24)
    assert not TARGETS["onnx"].rotates(64, 64)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_holds_states_of_fixed_size_or_says_what_is_missing(name):
    states = [StateSpec(layer, "conv", 0, "causal_conv1d_fn", (64, 3)) for layer in (3, 5)]
    target = get_target(name)
    if target.runs_in_onnxruntime:
        refuse_layers([LAYER], target, states)
        return
    with refused("E-TARGET-STATES", UnsupportedModel) as refusal:
        refuse_layers([LAYER], target, states)
    assert "layers 3, 5" in refusal.error.where
    assert target.states_missing in refusal.error.what
    assert all(row.name in refusal.error.fix for row in TARGETS.values() if row.runs_in_onnxruntime)
    refuse_layers([LAYER], target)
