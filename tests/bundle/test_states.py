"""The states of fixed size in a manifest: written, read back, and held against the tensors of the graph."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from refusal import refused

from gqa_export import graph_io
from gqa_export.bundle.manifest import Manifest
from gqa_export.errors import InvalidBundle
from gqa_export.spec import AttentionSpec, ModelSpec, StateSpec

STATES = (StateSpec(0, "conv", 0, "causal_conv1d_fn", (12, 3)), StateSpec(0, "conv", 1, "causal_conv1d_fn", (6, 3)),
          StateSpec(0, "recurrent", 0, "chunk_gated_delta_rule", (4, 8, 6)))
SPEC = ModelSpec("toy", "Toy", 32, 16, 64, "", (AttentionSpec(1, 4, 2, 8, 8, 0.5),), states=STATES)


def manifest(spec: ModelSpec = SPEC) -> Manifest:
    """Of a hybrid's bundle."""
    return Manifest("ort", "float16", "growing", 64, "all", "copy", spec,
                    graph_io.graph_inputs(spec, "float16", "growing"),
                    graph_io.graph_outputs(spec, "float16", "growing", "all"))


def test_states_come_back_from_a_manifest_and_are_fp32() -> None:
    read = Manifest.from_json(manifest().to_json())
    assert read.spec == SPEC
    names = [fact.name for fact in read.inputs[4:]]
    assert names == ["past_key_values.0.conv_state", "past_key_values.0.conv_state_1",
                     "past_key_values.0.recurrent_state"]
    assert {fact.dtype for fact in read.inputs[4:]} == {"float32"}
    assert SPEC.state_bytes == 4 * (12 * 3 + 6 * 3 + 4 * 8 * 6)


def test_a_manifest_from_before_there_were_states_is_read() -> None:
    spec = replace(SPEC, states=())
    data = json.loads(manifest(spec).to_json())
    del data["spec"]["states"]
    assert Manifest.from_json(json.dumps(data)).spec == spec


@pytest.mark.parametrize("wrong", [
    replace(SPEC, states=(*STATES, STATES[0])),
    replace(SPEC, states=(replace(STATES[0], shape=(4, 8, 6)), *STATES[1:])),
    replace(SPEC, states=(replace(STATES[0], shape=(12, 4)), *STATES[1:])),
    replace(SPEC, states=(replace(STATES[0], layer=1), *STATES[1:])),
], ids=["twice", "axes", "shape", "layer"])
def test_states_that_are_not_those_of_the_graph_are_refused(wrong: ModelSpec) -> None:
    with refused("E-BUNDLE-MANIFEST", InvalidBundle):
        Manifest.from_json(replace(manifest(), spec=wrong).to_json())
