"""The graphs of all ranks as one graph that ONNX Runtime can run: what one machine shows of many.

Every name gets its rank in front; the ranks share the inputs that are not caches. A collective becomes Sum or Concat
over the ranks' tensors. A cache has the heads of all ranks, one rank's behind the other's, replicas included. The
logits are those of rank 0, and NaN where another rank's are not the same.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .. import graph_io
from ..bundle.graph_file import read_graph
from ..bundle.manifest import Manifest
from ..bundle.parallel import DIST_COLLECTIVE, ParallelFacts, check_order
from ..errors import InvalidBundle
from ..spec import ModelSpec
from .collectives import ALL_REDUCE


def merged_spec(spec: ModelSpec, parallel: ParallelFacts) -> ModelSpec:
    """The model with a cache that has every head as often as ranks hold it."""
    held = held_heads_of(parallel)
    return replace(spec, layers=tuple(replace(layer, kv_num_heads=len(held[layer.layer])) for layer in spec.layers))


def held_heads_of(parallel: ParallelFacts) -> dict[int, tuple[int, ...]]:
    """Of each layer the K/V heads that the ranks hold, one rank's behind the other's."""
    found: dict[int, tuple[int, ...]] = {}
    for rank in parallel.ranks:
        for heads in rank.heads:
            found[heads.layer] = (*found.get(heads.layer, ()), *heads.kv)
    return found


def merge(folder: Path, manifest: Manifest) -> onnx.ModelProto:
    """One model of a bundle that is cut over ranks; its weights stay where they are, below `folder`.

    Raises:
        InvalidBundle: a rank's collectives or outputs are not those of the manifest.
    """
    parallel = manifest.parallel
    assert parallel is not None
    models = [read_graph(folder / facts.folder) for facts in parallel.ranks]
    for rank, model in enumerate(models):
        check_order(folder, parallel, rank, model)
        _check_outputs(folder, manifest, rank, model)
    merged = onnx.ModelProto(ir_version=models[0].ir_version, producer_name=models[0].producer_name)
    merged.opset_import.extend(models[0].opset_import)
    graph = merged.graph
    graph.name = models[0].graph.name
    shared = [value for value in models[0].graph.input if graph_io.layer_of_cache(value.name) is None]
    common = {value.name for value in shared}
    graph.input.extend(shared)
    parts = [_renamed(model, f"rank{rank}/", common, parallel.ranks[rank].folder) for rank, model in enumerate(models)]
    for part in parts:
        graph.initializer.extend(part.graph.initializer)
    _pasts(graph, models)
    _nodes(graph, parts)
    _logits(graph, models)
    _presents(graph, models)
    return merged


def _check_outputs(folder: Path, manifest: Manifest, rank: int, model: onnx.ModelProto) -> None:
    stated = {fact.name: fact.shape for fact in manifest.outputs}[graph_io.LOGITS]
    for value in model.graph.output:
        if value.name == graph_io.LOGITS:
            found = value.type.tensor_type.shape.dim[-1].dim_value
            if found != stated[-1]:
                raise InvalidBundle(f"rank {rank} gives logits of {found} tokens, expected {stated[-1]}", str(folder),
                                    "export the bundle again", code="E-BUNDLE-RANK-OUTPUT")


def _renamed(model: onnx.ModelProto, prefix: str, common: set[str], folder: str) -> onnx.ModelProto:
    """A rank's model with its name in front of every name but those of common inputs, weights below its folder."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        tensor.name = prefix + tensor.name
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{folder}/{entry.value}"
    for node in copy.graph.node:
        node.name = prefix + node.name
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name and name not in common:
                    names[place] = prefix + name
    return copy


def _pasts(graph: onnx.GraphProto, models: list[onnx.ModelProto]) -> None:
    """Cache inputs with the heads of all ranks, taken apart."""
    for place, value in enumerate(models[0].graph.input):
        if graph_io.layer_of_cache(value.name) is None:
            continue
        heads = [_heads(model.graph.input[place]) for model in models]
        graph.input.append(_with_heads(value, sum(heads)))
        sizes = f"merged/{value.name}/heads"
        graph.initializer.append(numpy_helper.from_array(np.array(heads, np.int64), sizes))
        names = [f"rank{rank}/{value.name}" for rank in range(len(models))]
        graph.node.append(helper.make_node("Split", [value.name, sizes], names, name=f"merged/{value.name}", axis=1))
        for name, count in zip(names, heads):
            typed = _with_heads(value, count)
            typed.name = name
            graph.value_info.append(typed)


def _presents(graph: onnx.GraphProto, models: list[onnx.ModelProto]) -> None:
    for place, value in enumerate(models[0].graph.output):
        if graph_io.layer_of_cache(value.name) is None:
            continue
        graph.output.append(_with_heads(value, sum(_heads(model.graph.output[place]) for model in models)))
        names = [f"rank{rank}/{value.name}" for rank in range(len(models))]
        graph.node.append(helper.make_node("Concat", names, [value.name], name=f"merged/{value.name}", axis=1))


def _heads(value: onnx.ValueInfoProto) -> int:
    return value.type.tensor_type.shape.dim[1].dim_value


def _with_heads(value: onnx.ValueInfoProto, heads: int) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.type.tensor_type.shape.dim[1].dim_value = heads
    return copy


def _nodes(graph: onnx.GraphProto, parts: list[onnx.ModelProto]) -> None:
    """The ranks' nodes up to a collective, then that collective, and so on: an order in which each can be computed."""
    rows = [iter(part.graph.node) for part in parts]
    while True:
        meeting = []
        for row in rows:
            for node in row:
                if node.op_type == DIST_COLLECTIVE:
                    meeting.append(node)
                    break
                graph.node.append(node)
        if not meeting:
            return
        sources = [node.input[0] for node in meeting]
        for node in meeting:
            operation = next(helper.get_attribute_value(each) for each in node.attribute
                             if each.name == "collective_operation").decode()
            merged = helper.make_node("Sum", sources, list(node.output), name=node.name) if operation == ALL_REDUCE \
                else helper.make_node("Concat", sources, list(node.output), name=node.name, axis=0)
            graph.node.append(merged)


def _logits(graph: onnx.GraphProto, models: list[onnx.ModelProto]) -> None:
    """Rank 0's logits, NaN where another rank has others."""
    value = next(each for each in models[0].graph.output if each.name == graph_io.LOGITS)
    graph.output.append(value)
    element = value.type.tensor_type.elem_type
    nan = numpy_helper.from_array(np.array(math.nan, helper.tensor_dtype_to_np_dtype(element)), "merged/nan")
    graph.initializer.append(nan)
    found = f"rank0/{graph_io.LOGITS}"
    for rank in range(1, len(models)):
        same, last = f"merged/same_{rank}", rank == len(models) - 1
        pair = [f"rank{rank}/{graph_io.LOGITS}", f"rank0/{graph_io.LOGITS}"]
        graph.node.append(helper.make_node("Equal", pair, [same], name=same))
        kept = graph_io.LOGITS if last else f"merged/logits_{rank}"
        graph.node.append(helper.make_node("Where", [same, found, "merged/nan"], [kept], name=f"{same}/kept"))
        found = kept
