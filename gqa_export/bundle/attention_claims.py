"""The attributes of a graph's attention nodes, held against the layers of the manifest.

A graph whose attributes contradict its manifest is refused by layer and attribute, before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import attention_op
from ..errors import InvalidBundle
from ..graph_io import layer_of_cache
from ..spec import AttentionSpec, KvCache, WindowCache
from .graph_file import read_graph
from .input_claims import check_inputs
from .manifest import MODEL, Manifest

if TYPE_CHECKING:
    import onnx

FIELDS = {"scale": "scale", "softcap": "softcap", "window": "window", "local_window_size": "window",
          "num_heads": "num_heads", "kv_num_heads": "kv_num_heads", "q_num_heads": "num_heads"}
"""attribute of an attention node -> field of `AttentionSpec`"""


def check_rings(model: onnx.ModelProto, windows: WindowCache | None, where: str) -> None:
    """Hold the layers whose slots a graph uses again against those of its manifest.

    Raises:
        InvalidBundle: a layer is a ring in one of the two only; names the first.
    """
    found = {number for node in model.graph.node if node.domain == attention_op.DOMAIN
             and any(a.name == "growing" and a.i == attention_op.RING for a in node.attribute)
             for name in node.output if (number := layer_of_cache(name)) is not None}
    for number in sorted(found.symmetric_difference(windows.layers if windows else ())):
        side = "the graph" if number in found else "the manifest"
        raise InvalidBundle(f"layer {number} uses the slots of its cache again in {side} only", where,
                            "model.onnx and gqa_export.json belong to different exports: export again",
                            code="E-BUNDLE-CLAIM")


def attention_facts(model: onnx.ModelProto, kv: KvCache | None = None) -> dict[int, dict[str, Any]]:
    """The attributes of attention nodes by layer and by field of `AttentionSpec`, for every layer whose attention node
    writes its present key itself. kv: the cache holds codes, and the scale of a call of ours has that of its keys as a
    factor."""
    codes = {scales.layer: scales.key for scales in kv.scales} if kv else {}
    found: dict[int, dict[str, Any]] = {}
    for node in model.graph.node:
        layer = next((number for name in node.output if (number := layer_of_cache(name)) is not None), None)
        if layer is None or "Attention" not in node.op_type:
            continue
        facts = {FIELDS[a.name]: a.f if a.type == 1 else a.i for a in node.attribute if a.name in FIELDS}
        if "window" in facts:  # com.microsoft writes none as -1, the op of ours chunks as less than none
            facts["chunk"] = max(-facts["window"], 0) if node.domain == attention_op.DOMAIN else 0
            facts["window"] = max(facts["window"], 0)
        inside = any(a.name == "cache_codes" and a.i for a in node.attribute)  # the plugin multiplies by itself
        if "scale" in facts and node.domain == attention_op.DOMAIN and not inside:
            facts["scale"] /= codes.get(layer, 1.0)
        found[layer] = facts
    return found


def check_claims(folder: Path, manifest: Manifest) -> None:
    """Hold the attention nodes of a bundle's graph against its manifest.

    Raises:
        InvalidBundle: an attribute has another value than the manifest; names layer and attribute.
    """
    if manifest.parallel is None:
        check_rings(read_graph(folder), manifest.window_cache, str(folder / MODEL))
        check_codes(read_graph(folder), manifest.kv_cache, str(folder / MODEL))
        check_inputs(read_graph(folder), manifest.quantization, str(folder / MODEL))
        _check_graph(folder, manifest.spec.layers, manifest.kv_cache)
    else:
        for rank in manifest.parallel.ranks:
            held = {heads.layer: heads for heads in rank.heads}
            _check_graph(folder / rank.folder, tuple(
                replace(layer, num_heads=held[layer.layer].queries, kv_num_heads=len(held[layer.layer].kv))
                for layer in manifest.spec.layers))


def check_codes(model: onnx.ModelProto, kv: KvCache | None, where: str) -> None:
    """Hold the codes that a graph's plugin nodes write against those of its manifest.

    Raises:
        InvalidBundle: a node has another type of codes or another scale; names layer and attribute.
    """
    stated = {scales.layer: {"cache_codes": attention_op.CACHE_CODES.get(kv.kind, 0), "key_scale": scales.key,
                             "value_scale": scales.value} for scales in kv.scales} if kv else {}
    for node in model.graph.node:
        layer = next((number for name in node.output if (number := layer_of_cache(name)) is not None), None)
        given = {a.name: a.f if a.type == 1 else a.i for a in node.attribute
                 if a.name in attention_op.CODE_ATTRIBUTE_NAMES}
        if layer is None or not given:
            continue
        for name, value in given.items():
            wanted = stated.get(layer, {}).get(name, 0)
            if not math.isclose(value, wanted, rel_tol=1e-6):
                raise InvalidBundle(f"layer {layer}: {name} is {value:g} in the graph, {wanted:g} in the manifest",
                                    where, "model.onnx and gqa_export.json belong to different exports: export again",
                                    code="E-BUNDLE-CLAIM")


def _check_graph(folder: Path, layers: Iterable[AttentionSpec], kv: KvCache | None = None) -> None:
    facts = attention_facts(read_graph(folder), kv)
    for layer in layers:
        for name, value in facts.get(layer.layer, {}).items():
            stated = getattr(layer, name)
            if not math.isclose(value, stated, rel_tol=1e-6, abs_tol=1e-9):
                raise InvalidBundle(f"layer {layer.layer}: {name} is {value:g} in the graph, {stated:g} in the "
                                    "manifest",
                                    str(folder / MODEL),
                                    "model.onnx and gqa_export.json belong to different exports: export again",
                                    code="E-BUNDLE-CLAIM")
