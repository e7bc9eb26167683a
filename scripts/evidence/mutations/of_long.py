"""Damage to the graph for long prompts, as public codes of HyperAttention have it or as a port may make it.

Each changes `prefill.onnx` of a copy: the calls, their tables, or the function body. The manifest is made to agree.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from gqa_export import long_attention_op
from gqa_export.bundle.long_facts import PREFILL
from gqa_export.bundle.manifest import MANIFEST, FileFact, read_manifest
from gqa_export.exporting.long_plan import LongOptions
from gqa_export.files.sha256 import file_sha256
from gqa_export.lowering.long_function import function_proto, is_long_call, variant_of

Nodes = Any
OPTIONS = {"tiles": LongOptions("tiles", "last:2", leaf=128, heavy=96, samples=16, anchors=3, from_tokens=128),
           "hyper": LongOptions("hyper", "last:2", leaf=64, heavy=16, samples=16, anchors=3, from_tokens=128)}
"""of the tiny bundles that are damaged"""
SINKS = long_attention_op.INPUT_NAMES.index("sinks")


def all_nodes(nodes: Nodes) -> Iterator[tuple[Nodes, int]]:
    """Every node of a list and of the subgraphs in it, as the list that holds it and its place there."""
    for place, node in enumerate(nodes):
        yield nodes, place
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g.node)


def body(model: onnx.ModelProto) -> onnx.FunctionProto:
    """The function body of the op."""
    return next(function for function in model.functions if function.name == long_attention_op.OP)


def maker(model: onnx.ModelProto, name: str) -> tuple[Nodes, int]:
    """Where the node of the body that makes a value is."""
    return next((nodes, place) for nodes, place in all_nodes(body(model).node) if name in nodes[place].output)


def rewrite(model: onnx.ModelProto, name: str, op: str, *inputs: str, **attributes: Any) -> None:
    """Let a value of the body be made by another node."""
    nodes, place = maker(model, name)
    outputs = list(nodes[place].output)
    nodes[place].CopyFrom(helper.make_node(op, inputs, outputs, **attributes))


def before(model: onnx.ModelProto, name: str, *made: onnx.NodeProto) -> None:
    """Put nodes before the one that makes a value of the body."""
    nodes, place = maker(model, name)
    for node in reversed(made):
        nodes.insert(place, node)


def is_hyper(model: onnx.ModelProto) -> bool:
    """Whether the body is that of method hyper."""
    return any("key_hash" in nodes[place].output for nodes, place in all_nodes(body(model).node))


def calls(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The calls of the op."""
    return [node for node in model.graph.node if is_long_call(node)]


def weight_dropped(model: onnx.ModelProto) -> None:
    """Samples count once, whatever they stand for."""
    rewrite(model, "log_weight", "Sub", "stands_for", "stands_for")


def counted_twice(model: onnx.ModelProto) -> None:
    """A sample that is a heavy key counts again."""
    name = "sample_bias" if is_hyper(model) else "sample_bias_3"
    nodes, place = maker(model, name)
    nodes[place].input[1] = "log_weight"


def zero_key(model: onnx.ModelProto) -> None:
    """A key of zeros, with exp(0), is in every softmax."""
    for number, node in enumerate(calls(model)):
        heads = next(a.i for a in node.attribute if a.name == "num_heads")
        zeros = numpy_helper.from_array(np.zeros(heads, np.float32), f"broken.{number}.sinks")
        model.graph.initializer.append(zeros)
        node.input[SINKS] = zeros.name


def _tables(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.startswith("long.") and tensor.name.endswith(name):
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))


def seed_changed(model: onnx.ModelProto) -> None:
    """Samples of another seed."""
    random = np.random.default_rng(1)
    _tables(model, "fractions", lambda table: random.integers(0, 65536, table.shape))


def directions_changed(model: onnx.ModelProto) -> None:
    """A hash of another seed. Method tiles has none: its samples are changed."""
    random = np.random.default_rng(1)
    if not is_hyper(model):
        return seed_changed(model)
    return _tables(model, "projections", lambda table: random.standard_normal(table.shape).astype(np.float32))


def future_samples(model: onnx.ModelProto) -> None:
    """Samples are drawn from the row's own leaf, what comes later included."""
    before(model, "sample_key", helper.make_node("Sub", ["own_width", "single"], ["broken_last"]),
           helper.make_node("Min", ["sample_1", "broken_last"], ["broken_index"]))
    for name in ("key", "value"):
        rewrite(model, f"sample_{name}", "GatherND", f"own_{name}", "broken_index", batch_dims=1)


def anchors_dropped(model: onnx.ModelProto) -> None:
    """The first keys are not always read."""
    for node in calls(model):
        next(a for a in node.attribute if a.name == "anchors").i = 0
    opset = body(model).opset_import[0].version
    attributes = [{a.name: helper.get_attribute_value(a) for a in node.attribute} for node in calls(model)]
    body(model).CopyFrom(function_proto(opset, variant_of(attributes)))


def off_by_one(model: onnx.ModelProto) -> None:
    """Buckets begin one key later, or the block before the chosen one is read."""
    if is_hyper(model):
        for kind in ("key", "value"):
            whole, name = ("KXD", "KXE")[kind == "value"], f"sorted_{kind}"
            rewrite(model, f"bucket_{kind}", "Reshape", f"broken_{kind}", f"bucket_{kind}_shape")
            before(model, f"bucket_{kind}",
                   helper.make_node("Slice", [f"{name}_{whole}", "single", "width_1", "axis_1"], [f"broken_{kind}_1"]),
                   helper.make_node("Slice", [f"{name}_{whole}", "axis_0", "single", "axis_1"], [f"broken_{kind}_2"]),
                   helper.make_node("Concat", [f"broken_{kind}_1", f"broken_{kind}_2"], [f"broken_{kind}"], axis=1))
        return
    rewrite(model, "top_block_K1", "Unsqueeze", "broken_block", "axis_last")
    before(model, "top_block_K1", helper.make_node("Sub", ["top_block_K", "one"], ["broken_before"]),
           helper.make_node("Max", ["broken_before", "zero"], ["broken_block"]))


def padding_ranked(model: onnx.ModelProto) -> None:
    """Rows that are padding are ranked, or vote, as if they were tokens."""
    if is_hyper(model):
        rewrite(model, "is_mine_L", "Or", "from_low_L", "to_high_L")
        rewrite(model, "some_rows", "Identity", "leaf_")
    else:
        rewrite(model, "rows_to", "Identity", "tile_to")


LONG_MUTATIONS: tuple[Callable[[onnx.ModelProto], None], ...] = (
    weight_dropped, counted_twice, zero_key, seed_changed, directions_changed, future_samples, anchors_dropped,
    off_by_one, padding_ranked)


def broken_bundle(folder: Path, copy: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of a bundle whose graph for long prompts is damaged."""
    shutil.copytree(folder, copy)
    model = onnx.load(copy / PREFILL, load_external_data=False)
    change(model)
    (copy / PREFILL).write_bytes(model.SerializeToString())
    manifest = read_manifest(copy)
    fact = FileFact((copy / PREFILL).stat().st_size, file_sha256(copy / PREFILL))
    (copy / MANIFEST).write_text(replace(manifest, files={**manifest.files, PREFILL: fact}).to_json())
    return copy
