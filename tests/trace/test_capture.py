"""Is the light capture the graph that torch.export makes? Does it step aside where it would be wrong?"""

from __future__ import annotations

import copy

import gqa_models
import onnx
import pytest
import torch
from evidence.output_hashes import output_hashes
from gqa_models.shrink import write_small
from refusal import refused
from transformers import AutoConfig

from gqa_export.errors import UnsupportedModel
from gqa_export.trace.capture import capture, export, functionalize, translate
from gqa_export.trace.capture.capture import Input, NotCaptured
from gqa_export.trace.tracing import trace


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


SHORTER = {"gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
           "llama_tied": {"num_hidden_layers": 2}, "stablelm": {"num_hidden_layers": 1},
           "granite": {"num_hidden_layers": 1}}
"""each kind of layer once, and one kind twice: the stock way takes 4 s a layer"""


@pytest.mark.whole_model
@pytest.mark.usefixtures("no_trace_cache")
@pytest.mark.parametrize("name", SHORTER)
def test_the_light_capture_is_the_graph_of_torch_export(tmp_path, monkeypatch, name):
    options = {"dtype": "float16", "cache": "static", "capacity": 64, "logits": "last", "interface": "lengths"}
    config = config_of(name, tmp_path, **SHORTER[name])
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


def test_a_model_is_asked_for_all_its_positions_and_no_more():
    points = capture.sizes(True, longest=1000)
    assert max(point["total"] for point in points) == max(point["new"] for point in points) == 1000
    assert {point["past"] for point in points} >= {0, 999}
    assert max(point["past"] for point in capture.sizes(False, longest=1000)) == 1000


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


@pytest.mark.whole_model
@pytest.mark.usefixtures("no_trace_cache")
def test_a_model_that_computes_otherwise_at_other_lengths_is_refused_with_the_length(tmp_path):
    """BigBird sees every token up to 704 of them, and beyond a choice of blocks."""
    config = AutoConfig.from_pretrained(write_small("big_bird", tmp_path / "m"), attention_type="block_sparse",
                                        max_position_embeddings=1024)
    with refused("E-MODEL-LENGTHS", UnsupportedModel) as refusal:
        trace(config, dtype="float32", cache="growing", capacity=64)
    assert "new <= 704 fails at new = 1024" in refusal.error.what


@pytest.mark.whole_model
def test_experts_that_add_in_place_take_the_light_way_and_are_summed_in_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_stock", lambda *_: pytest.fail("the light way did not do"))
    model = trace(config_of("gpt_oss", tmp_path, num_hidden_layers=1), dtype="float16", cache="growing", capacity=64,
                  stamping=False).model
    made_by = {name: node for node in model.graph.node for name in node.output}
    sums = [node for node in model.graph.node if node.op_type == "ReduceSum" and "experts" in node.name]
    assert sums
    for node in sums:
        assert made_by[node.input[0]].op_type == "Cast"


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
    assert not functionalize.writes(graph.graph)
    assert torch.equal(graph({}, given), Fills()(given))  # it has no weights


class Adds(torch.nn.Module):
    """An update in place, read before and after; `shared`: through a second view as well."""

    def __init__(self, shared):
        super().__init__()
        self.shared = shared

    def forward(self, x):
        made = torch.sin(x)
        row = made.squeeze(0) if self.shared else made
        before = row * 3
        row += before
        return (made if self.shared else row) + before


@pytest.mark.parametrize("shared", [False, True])
def test_an_update_in_place_is_what_eager_computes(shared):
    _, table, kept = translate.library(export.OPSET)
    given = torch.linspace(0, 1, 12).view(1, 3, 4)
    graph, _ = capture.capture(Adds(shared), [Input("x", given, {1: "new"})], table, kept, [{"new": 5}])
    assert not functionalize.writes(graph.graph)
    assert torch.equal(graph({}, given), Adds(shared)(given))


def copies_left(module, given):
    recorded = torch.fx.experimental.proxy_tensor.make_fx(module, tracing_mode="fake")(given)
    functionalize.settle(recorded.graph)
    recorded.graph.lint()
    expected = module(given.clone())
    assert torch.equal(recorded(given.clone()), expected)
    return sum(node.target is functionalize.COPY for node in recorded.graph.nodes)


def test_only_a_copy_into_memory_that_nobody_shares_is_settled():
    def alone(x):
        made = torch.sin(x)
        made.copy_(made + 1)
        return made * 2

    def through_a_view_of_its_own(x):
        made = torch.sin(x).view(4, 3)
        made.copy_(made + 1)
        return made * 2

    def a_view_reads_it(x):
        made = torch.sin(x)
        seen = made.view(4, 3)
        made.copy_(made + 1)
        return seen * 2

    def a_part_of_it(x):
        made = torch.sin(x)
        made[1:].copy_(made[1:] + 1)
        return made * 2

    def an_input(x):
        x.copy_(x + 1)
        return x * 2

    def its_source_changes(x):
        made, other = torch.sin(x), torch.cos(x)
        made.copy_(other)
        other.copy_(other + 1)
        return made * other

    def twice(x):
        made = torch.sin(x)
        made.copy_(made + 1)
        made.copy_(made * 2)
        return made

    def rounded(x):
        made = torch.sin(x)
        made.copy_((made + 1).to(torch.float16))
        return made * 2

    def broadcast(x):
        made = torch.sin(x)
        made.copy_(made[:1] + 1)
        return made * 2

    left = {function.__name__: copies_left(function, torch.rand(3, 4)) for function in (
        alone, through_a_view_of_its_own, twice, a_view_reads_it, a_part_of_it, an_input, its_source_changes, rounded,
        broadcast)}
    assert left == {"alone": 0, "through_a_view_of_its_own": 0, "twice": 0, "a_view_reads_it": 1, "a_part_of_it": 1,
                    "an_input": 1, "its_source_changes": 1, "rounded": 1, "broadcast": 1}


def test_ops_that_change_a_shape_in_place_are_not_taken_for_updates():
    table = {torch.ops.aten.squeeze_.default: len, torch.ops.aten.add_.Tensor: len, functionalize.COPY: len}
    kept = functionalize.plainly(table)
    assert [op for op in table if kept[op] is len] == [torch.ops.aten.squeeze_.default, functionalize.COPY]
