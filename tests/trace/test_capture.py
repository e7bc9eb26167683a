"""Is the light capture the graph that torch.export makes? Does it step aside where it would be wrong?"""

from __future__ import annotations

import copy

import gqa_models
import onnx
import pytest
import torch
from transformers import AutoConfig

from gqa_export.trace import capture, export, trace, translate
from gqa_export.trace.capture import Input, NotCaptured
from gqa_export.trace.structure import output_hashes


def config_of(name, folder, **overrides):
    return AutoConfig.from_pretrained(gqa_models.write_tiny(name, folder / name, **overrides))


def untied(traced) -> onnx.ModelProto:
    """The model with every tied weight under the first of its names: either way may pick any of them."""
    first = {name: group[0] for group in traced.tied for name in group}
    model = copy.deepcopy(traced.model)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            name = entry.value.removeprefix("weights:")
            entry.value = f"weights:{first.get(name, name)}"
    return model


@pytest.fixture
def no_trace_cache(monkeypatch):
    monkeypatch.setenv("GQA_EXPORT_TRACE_CACHE", "off")


@pytest.mark.usefixtures("no_trace_cache")
@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "stablelm", "granite"])
def test_the_light_capture_is_the_graph_of_torch_export(tmp_path, monkeypatch, name):
    options = {"dtype": "float16", "cache": "static", "capacity": 64, "logits": "last", "interface": "lengths"}
    config = config_of(name, tmp_path)
    ways = []
    stock = export._stock
    monkeypatch.setattr(export, "_stock", lambda *rest: ways.append("stock") or stock(*rest))
    light = trace(config, **options)
    assert ways == []
    monkeypatch.setattr(export, "_light", lambda *_: (_ for _ in ()).throw(NotCaptured("not this time")))
    whole = trace(config, **options)
    assert ways == ["stock"]
    assert output_hashes(untied(light)) == output_hashes(untied(whole))
    assert light.traced_layers == whole.traced_layers


class Branch(torch.nn.Module):
    def forward(self, ids):
        return ids.float() * (2.0 if ids.shape[1] > 16 else 3.0)


class Fixed(torch.nn.Module):
    def forward(self, ids):
        return ids.float().reshape(2, -1).sum(1)


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, ids):
        return self.inner(ids[..., None].float().expand(-1, -1, 4))


def capture_alone(module):
    _, table, kept = translate.library(export.OPSET)
    given = [Input("ids", torch.zeros(2, 3, dtype=torch.int64), {0: "batch", 1: "new"})]
    with torch.no_grad():
        return capture.capture(module, given, table, kept, capture.sizes(True))


def test_a_branch_on_a_size_is_noticed():
    with pytest.raises(NotCaptured, match="other sizes do not take"):
        capture_alone(Branch())


def test_a_size_taken_for_a_constant_is_noticed():
    with pytest.raises(NotCaptured, match=r"fails at|was taken to be"):
        capture_alone(Fixed())


def test_nodes_know_the_module_they_came_from():
    graph, names = capture_alone(Plain())
    linear = next(node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert [name for name, _ in linear.meta["nn_module_stack"].values()] == ["", "inner"]
    assert set(names.values()) == {"inner.weight", "inner.bias", "ids"}


def test_windows_and_the_capacity_are_among_the_sizes_tried():
    lengths = {point["past"] for point in capture.sizes(True, edges=(48,))}
    assert {47, 48, 49} <= lengths
    assert min(point["past"] for point in capture.sizes(False)) == 1


class Halves(torch.nn.Module):
    def forward(self, ids):
        return ids * 0.5 + ids.to(torch.float16)


def test_types_are_promoted_where_they_mix_and_only_there():
    mixed, names = capture_alone(Halves())
    assert translate.mixes_types(mixed)
    plain, _ = capture_alone(Plain())
    assert not translate.mixes_types(plain)
    model = translate.translate(mixed, names, ["ids"], ["out"], {}, export.OPSET)
    assert [node.op_type for node in model.graph][-1] == "Add"
    assert model.graph.outputs[0].dtype.name == "FLOAT"


def test_a_tensor_that_a_model_fills_in_place_is_recorded_as_new_tensors():
    class Fills(torch.nn.Module):
        def forward(self, x):
            made = x.new_empty(x.shape[0], 6)
            made[:, :2].copy_(x[:, :2])
            made[:, 2:].copy_(x * 2)
            return made.sum(0)

    _, table, kept = translate.library(export.OPSET)
    given = torch.arange(12.0).view(3, 4)
    graph, _ = capture.capture(Fills(), [Input("x", given, {0: "batch"})], table, kept, [{"batch": 5}])
    assert not capture._writes(graph)
    assert torch.equal(graph({}, given), Fills()(given))  # it has no weights
