"""The kinds of damage to layers without a cache, which read that of another layer (Gemma 3n, Gemma 4)."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from evidence.mutations.mutation import Broken, Mutation, NotHere
from gqa_export.graph_io import past_names, present_names
from gqa_export.spec import AttentionSpec


def _reader(broken: Broken) -> tuple[AttentionSpec, AttentionSpec]:
    """The last layer without a cache, and an owner with the same sizes whose cache it does not read."""
    spec = broken.manifest.spec
    for layer in reversed(spec.layers):
        for other in spec.owners if layer.owner is not None else ():
            if other.layer != layer.owner and (other.kv_num_heads, other.head_size) == (layer.kv_num_heads,
                                                                                       layer.head_size):
                return layer, other
    raise NotHere("a layer that reads another's cache")


def _rename(broken: Broken, layer: AttentionSpec, wanted: Callable[[str], str | None]) -> None:
    """Let the nodes of a layer read other tensors: what `wanted` gives for a name."""
    for node in broken.model.graph.node:
        if f"layers.{layer.layer}." in node.name:
            for place, name in enumerate(node.input):
                node.input[place] = wanted(name) or name


def wrong_owner(broken: Broken) -> None:
    """A layer without a cache reads that of an owner that is not its own."""
    layer, other = _reader(broken)
    assert layer.owner is not None
    names = {**dict(zip(present_names(layer.owner), present_names(other.layer), strict=True)),
             **dict(zip(past_names(layer.owner), past_names(other.layer), strict=True))}
    _rename(broken, layer, names.get)


def value_for_key(broken: Broken) -> None:
    """A layer without a cache reads its owner's values as keys, too."""
    layer, _ = _reader(broken)
    assert layer.owner is not None
    key, value = present_names(layer.owner)
    if not any(key in node.input for node in broken.nodes if _of(node, layer)):
        raise NotHere("a cache of an owner that is read as it is")
    _rename(broken, layer, {key: value}.get)


def _of(node: onnx.NodeProto, layer: AttentionSpec) -> bool:
    return f"layers.{layer.layer}." in node.name


SHARED_MUTATIONS = (
    Mutation("wrong owner", "a layer without a cache reads another owner's", wrong_owner, -1),
    Mutation("owner's value for its key", "a layer without a cache reads values as keys", value_for_key, -1),
)
