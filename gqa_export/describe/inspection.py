"""What a decoder's attention and states are made of and what they cost: figures from a `ModelSpec`, no weights read.

Bytes of a cache: per layer K * (D + E) * element size for every token of every sequence (dimensions as in
`gqa_export.attention_op`). All layers keep all tokens, windowed ones too, unless they keep rings of fewer slots
(`--window-cache small`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ..bundle.graph_file import read_graph
from ..bundle.graph_safety import stored_bytes
from ..bundle.integrity import main_files
from ..bundle.manifest import Manifest
from ..bundle.rank_view import ranks_of
from ..errors import InvalidBundle
from ..spec import FLOATS, SHORT_DTYPES, AttentionSpec, ModelSpec, WindowCache
from ..weights.dtypes import itemsize
from .stored_matrices import StoredMatrix

COMMON_CONTEXTS = (1024, 4096)


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose attention is the same, by number, described by the first."""

    layers: tuple[int, ...]
    attention: AttentionSpec


@dataclass(frozen=True)
class CacheCost:
    """KV-cache bytes of one sequence of `tokens`, beside those of the same model as MHA (K = H) and as MQA (K = 1)."""

    tokens: int
    bytes: int
    mha_bytes: int
    mqa_bytes: int


@dataclass(frozen=True)
class Inspection:
    """All that `gqa-export inspect` prints.

    Attributes:
        source: what the user gave.
        kind: "bundle" or "checkpoint".
        spec: facts of the model and of every attention layer.
        element_dtype: short name of the type of the cache (bundle) or of the stored weights.
        groups: layers whose attention is the same.
        costs: of a cache, at several lengths.
        parameters: elements of all weights; None of an engine, which cannot be read without a GPU.
        weight_bytes: bytes of all weights; None of an engine.
        manifest: of a bundle.
        matrices: of a checkpoint that is quantized, each as it is stored.
        engine_bytes: of the engine, or of those of all ranks; None where there is a graph.
    """

    source: str
    kind: str
    spec: ModelSpec
    element_dtype: str
    groups: tuple[LayerGroup, ...]
    costs: tuple[CacheCost, ...]
    parameters: int | None
    weight_bytes: int | None
    manifest: Manifest | None = None
    matrices: tuple[StoredMatrix, ...] = ()
    engine_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`: one entry of `layers` for every attention layer, of `states` for every state."""
        data = asdict(self)
        del data["groups"]
        if self.kind == "bundle":  # whose manifest has what became of them
            del data["matrices"]
        if self.engine_bytes is None:
            del data["engine_bytes"]
        data["kv_cache"] = data.pop("costs")
        layers = data["spec"].pop("layers")
        data["layers"] = [{"kind": kind_of_attention(layer), **facts}
                          for layer, facts in zip(self.spec.layers, layers, strict=True)]
        data["states"] = [{"name": state.name, "bytes": state.bytes, **facts}
                          for state, facts in zip(self.spec.states, data["spec"].pop("states"), strict=True)]
        manifest = data.pop("manifest")
        if manifest is not None:
            manifest.pop("spec")
            data["bundle"] = manifest
        return data


def layer_groups(layers: Iterable[AttentionSpec]) -> tuple[LayerGroup, ...]:
    """Equal layers, together, in the order in which each kind is first met; whose cache a layer reads is no kind."""
    kinds: dict[AttentionSpec, list[AttentionSpec]] = {}
    for layer in layers:
        alike = layer.cached_alike or layer.owner is not None
        kinds.setdefault(replace(layer, layer=0, owner=None, cached_alike=alike), []).append(layer)
    return tuple(LayerGroup(tuple(layer.layer for layer in members), members[0]) for members in kinds.values())


def with_kv_heads(spec: ModelSpec, shared: bool) -> ModelSpec:
    """The same model as MQA (one key/value head shared by all) or as MHA (one for every query head)."""
    return replace(spec, layers=tuple(replace(layer, kv_num_heads=1 if shared else layer.num_heads)
                                      for layer in spec.layers))


def cache_costs(spec: ModelSpec, element_dtype: str, longest: int, bits: int = 0,
                windows: WindowCache | None = None) -> tuple[CacheCost, ...]:
    """The cost of one token, of the common contexts below `longest`, and of `longest`. bits: of a code of a quantized
    cache; 0: it holds numbers of `element_dtype`. windows: layers that keep rings."""
    bits = bits or 8 * itemsize(FLOATS[element_dtype])
    models = spec, with_kv_heads(spec, shared=False), with_kv_heads(spec, shared=True)
    counts = [1, *(count for count in COMMON_CONTEXTS if count < longest), *([longest] if longest > 1 else [])]
    return tuple(CacheCost(count, *(cache_bytes(model, bits, count, windows) for model in models)) for count in counts)


def cache_bytes(spec: ModelSpec, bits: int, tokens: int, windows: WindowCache | None = None) -> int:
    """Bytes of the cache of one sequence of `tokens`, whose elements have so many bits."""
    kept = [(layer, min(tokens, windows.slots(layer) or tokens) if windows else tokens) for layer in spec.owners]
    return sum(layer.cache_bytes_per_token(bits) * count for layer, count in kept) // 8


def kind_of_attention(layer: AttentionSpec) -> str:
    """MHA, GQA or MQA."""
    if layer.kv_num_heads == layer.num_heads:
        return "MHA"
    return "MQA" if layer.kv_num_heads == 1 else "GQA"


def stored_in_graph(*folders: Path) -> tuple[int, int]:
    """Elements and bytes of the constants that graphs refer to (weights, rotary tables), shared ones of a graph once.

    Only the graphs are read.

    Raises:
        InvalidBundle: the graph is missing or cannot be parsed.
    """
    seen: set[tuple[str, ...]] = set()
    elements = size = 0
    for place in folders:
        for tensor in read_graph(place).graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            identity = (str(place), *((entries["location"], entries.get("offset", "0")) if entries else (tensor.name,)))
            if identity in seen:
                continue
            seen.add(identity)
            elements += prod(tensor.dims)
            size += stored_bytes(tensor)
    return elements, size


def engine_size(folder: Path, manifest: Manifest) -> int:
    """Bytes of a bundle's engines.

    Raises:
        InvalidBundle: one is missing; names it.
    """
    for name in main_files(manifest):
        if not (folder / name).is_file():
            raise InvalidBundle(f"the bundle's file {name} is missing", str(folder),
                                "copy the bundle again, or export it again", code="E-BUNDLE-FILE")
    return sum((folder / name).stat().st_size for name in main_files(manifest))


def inspect_bundle(folder: Path, manifest: Manifest) -> Inspection:
    """The figures of a bundle, from its manifest and its graph. Of an engine, which only a GPU reads, the manifest says
    what the graph held that it was built from.

    Raises:
        InvalidBundle: the graph or the engine is missing, or the graph cannot be parsed.
    """
    spec = manifest.spec
    parameters, weight_bytes = (None, None) if manifest.engine else stored_in_graph(
        *(place for _, place, _ in ranks_of(folder, manifest)))
    dtype, longest = SHORT_DTYPES.get(manifest.dtype, manifest.dtype), manifest.capacity or spec.max_positions
    return Inspection(str(folder), "bundle", spec, dtype, layer_groups(spec.layers),
                      cache_costs(spec, dtype, longest, manifest.kv_cache.bits if manifest.kv_cache else 0,
                                  manifest.window_cache),
                      parameters, weight_bytes, manifest,
                      engine_bytes=engine_size(folder, manifest) if manifest.engine else None)


def inspect_checkpoint(source: str, spec: ModelSpec, stored_dtype: str, parameters: int, weight_bytes: int,
                       matrices: tuple[StoredMatrix, ...] = ()) -> Inspection:
    """The figures of a checkpoint.

    Args:
        source: what the user gave.
        spec: the facts of its attention layers.
        stored_dtype: the type of its weights, in which an export would keep the cache; fp32 for a type without a cache.
        parameters: elements of all weights.
        weight_bytes: bytes of all weights.
        matrices: of a quantized one.
    """
    dtype = SHORT_DTYPES.get(stored_dtype, "fp32")
    return Inspection(source, "checkpoint", spec, dtype, layer_groups(spec.layers),
                      cache_costs(spec, dtype, spec.max_positions), parameters, weight_bytes, matrices=matrices)
