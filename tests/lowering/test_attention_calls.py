"""Every target finds attention in the same way, and refuses a node that disagrees with the spec of its layer."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
from onnx import helper, numpy_helper
from refusal import refused

from gqa_export import attention_op
from gqa_export.errors import UnsupportedModel
from gqa_export.graph import edit
from gqa_export.graph.passes import run_passes
from gqa_export.lowering.attention_calls import attention_calls
from gqa_export.lowering.context import Context, LowerOptions
from gqa_export.spec import AttentionSpec
from gqa_export.targets import TARGETS

from .test_near_misses import LISTS
from .whole_model import CAPACITY, canonical

DISAGREEMENTS = {"window": 5, "scale": 0.5, "softcap": 3.0, "num_heads": 8, "kv_num_heads": 4, "head_size": 32,
                 "value_head_size": 32, "sinks": True}


def refusal_of(target: str, change, model: onnx.ModelProto | None = None):
    """What the target's own passes over a graph say when the spec of layer 1 is changed."""
    original, spec = canonical("llama", "static", logits="last")
    layers = tuple(change(layer) if layer.layer == 1 else layer for layer in spec.layers)
    context = Context(replace(spec, layers=layers), TARGETS[target], LowerOptions(target, "static", CAPACITY, "last"),
                      original)
    steps = [replace(step, requires=()) for step in LISTS[target].PASSES if step.name != "refuse_layers"]
    with refused("E-GRAPH-LAYER-FACTS", UnsupportedModel) as refusal:
        run_passes(edit.load(model or original), steps, context)
    return refusal.error


@pytest.mark.parametrize("fact", DISAGREEMENTS)
@pytest.mark.parametrize("target", LISTS)
def test_a_node_that_disagrees_with_its_layer_is_refused_on_every_target(target: str, fact: str):
    def change(layer: AttentionSpec) -> AttentionSpec:
        assert getattr(layer, fact) != DISAGREEMENTS[fact]
        return replace(layer, **{fact: DISAGREEMENTS[fact]})

    error = refusal_of(target, change)
    assert "layer 1" in error.what
    assert fact in error.what
    assert "layers.1." in error.where


@pytest.mark.parametrize("target", LISTS)
def test_a_node_whose_window_was_changed_is_refused_on_every_target(target: str):
    model = onnx.ModelProto()
    model.CopyFrom(canonical("llama", "static", logits="last")[0])
    call = [node for node in model.graph.node if node.op_type == attention_op.OP][1]
    next(attribute for attribute in call.attribute if attribute.name == "window").i = 7
    error = refusal_of(target, lambda layer: layer, model)
    assert "window is 7, expected 0" in error.what


def test_all_disagreements_of_a_node_are_given_at_once():
    error = refusal_of("ort", lambda layer: replace(layer, window=5, softcap=3.0))
    assert "window" in error.what
    assert "softcap" in error.what


def test_an_attribute_that_is_lost_is_a_disagreement():
    model = onnx.ModelProto()
    model.CopyFrom(canonical("llama", "static", logits="last")[0])
    call = [node for node in model.graph.node if node.op_type == attention_op.OP][1]
    kept = [attribute for attribute in call.attribute if attribute.name != "softcap"]
    del call.attribute[:]
    call.attribute.extend(kept)
    assert "softcap is None" in refusal_of("portable", lambda layer: layer, model).what


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_every_call_of_a_sound_model_is_found_with_its_layer(name: str):
    model, spec = canonical(name)
    context = Context(spec, TARGETS["ort"], LowerOptions("ort"), model)
    calls = attention_calls(edit.load(model), context)
    assert [call.layer for call in calls.found] == list(spec.layers)
    assert not calls.near_misses


@pytest.mark.parametrize("target", LISTS)
def test_a_node_that_reads_the_values_of_another_layer_is_refused_on_every_target(target: str):
    model = onnx.ModelProto()
    model.CopyFrom(canonical("llama", "static", logits="last")[0])
    call = [node for node in model.graph.node if node.op_type == attention_op.OP][1]
    call.input[attention_op.input_index("past_value")] = "past_key_values.0.value"
    assert "'past_key_values.0.value'" in refusal_of(target, lambda layer: layer, model).what


def test_what_stands_in_place_of_a_call_is_named():
    model = onnx.ModelProto()
    original, spec = canonical("llama")
    model.CopyFrom(original)
    first, second, third = [node for node in model.graph.node if node.op_type == attention_op.OP]
    place = attention_op.input_index("past_key")
    first.op_type = "Other"
    second.input[place], second.input[place + 1] = second.input[place + 1], second.input[place]
    model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(
        helper.make_tensor("nothing", onnx.TensorProto.FLOAT, [1, 1, 1, 1], [0.0])), "nothing"))
    third.input[place] = "nothing"
    context = Context(spec, TARGETS["ort"], LowerOptions("ort"), model)
    calls = attention_calls(edit.load(model), context)
    assert not calls.found
    by_node = {miss.node: miss.reason for miss in calls.near_misses}
    assert "is gqa::Other" in by_node[first.name]
    assert "'past_key_values.1.value'" in by_node[second.name]
    assert "'nothing'" in by_node[third.name]
    assert "is not read" in by_node["past_key_values.2.key"]
