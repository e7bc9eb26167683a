"""Target `trt-plugin`: the graph for long prompts has plugin nodes of version 2, beside an exact graph that stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from gqa_models import write_tiny
from gqa_plugins.grouped_attention import fields
from gqa_plugins.grouped_attention.long_layer import LongLayer
from onnx.helper import get_attribute_value
from refusal import refused

import gqa_export as gqa
from gqa_export.bundle.long_facts import PREFILL
from gqa_export.bundle.manifest import DATA, MODEL, read_manifest
from gqa_export.exporting.long_plan import LongOptions
from gqa_export.validation.validate import validate

TILES = LongOptions("tiles", "last:2", leaf=64, heavy=64, samples=16, anchors=3)
OPTIONS = {"tiles": TILES, "hyper": replace(TILES, method="hyper", heavy=16)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("long") / "llama")


def export(checkpoint: Path, folder: Path, options: LongOptions | None, dtype: str = "fp32") -> gqa.Bundle:
    return gqa.export(checkpoint, folder, target="trt-plugin", capacity=512, long_attention=options, dtype=dtype)


def nodes(graph: Path) -> list[tuple[list[str], dict]]:
    """Inputs and attributes of a graph's plugin nodes."""
    found = [node for node in onnx.load(graph, load_external_data=False).graph.node if node.op_type == fields.NAME]
    return [(list(node.input), {one.name: get_attribute_value(one) for one in node.attribute}) for node in found]


@pytest.mark.parametrize("method", OPTIONS)
def test_nodes_of_the_plan_s_layers_approximate_and_the_rest_is_as_without(checkpoint, tmp_path, method) -> None:
    plain = export(checkpoint, tmp_path / "plain", None)
    bundle = export(checkpoint, tmp_path / "long", OPTIONS[method])
    for name in (MODEL, DATA):
        assert (plain.folder / name).read_bytes() == (bundle.folder / name).read_bytes()
    assert {attributes["plugin_version"] for _, attributes in nodes(plain.folder / MODEL)} == {b"1"}
    plan = read_manifest(bundle.folder).long.plan
    assert plan.from_tokens == plan.setting.leaf == 64
    layers = []
    for inputs, attributes in nodes(bundle.folder / PREFILL):
        assert attributes.pop("plugin_version") == b"2"
        attributes.pop("plugin_namespace")
        layers.append(LongLayer.from_fields(attributes))
        assert len(inputs) == len(fields.node_inputs(attributes))
    assert [layer.long for layer in layers] == [None, plan.setting, plan.setting]
    assert all(layer.has_rotary for layer in layers), "rotation is inside of nodes that approximate too"


@pytest.mark.parametrize(("method", "dtype"), [("hyper", "fp32"), ("tiles", "bf16")])
def test_a_bundle_is_validated_with_its_selection_handed_over(checkpoint, tmp_path, method, dtype) -> None:
    """In bf16 an fp32 twin of each of its graphs is run."""
    verdict = validate(export(checkpoint, tmp_path / "long", OPTIONS[method], dtype).folder, checkpoint)
    assert verdict.passed
    cases = {case.name: case for case in verdict.cases}
    assert {"teacher_forced", "long_prompt", "long_ragged", "long_leaf"} <= set(cases)
    assert [kind.kind for kind in cases["long_prompt"].kinds] == ["logits", "selection"]
    assert any("long_prompt" in note and "selections are the fp64 reference" in note for note in verdict.notes)


def test_options_that_one_graph_cannot_hold_are_refused(checkpoint, tmp_path) -> None:
    with refused("E-OPTION-LONG") as found:
        export(checkpoint, tmp_path / "long", replace(TILES, from_tokens=128))
    assert "--long-from" in found.error.where
    assert not (tmp_path / "long").exists()
