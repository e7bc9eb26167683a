"""Whether TensorRT built the engine that the bundle describes: inputs, outputs, attention layers, aliases, no copy of
the cache.

A machine that cannot open the engine has nothing but the network and the build log.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..bundle.engine_facts import EngineFacts
from ..bundle.input_claims import rounding_products
from ..bundle.manifest import Manifest
from ..bundle.parallel import collective_order
from ..errors import GqaExportError
from ..graph_io import TensorFact, past_names, present_names
from .build_job import Built, Tensor
from .build_log import Log

if TYPE_CHECKING:
    import onnx

TYPES = {"HALF": "float16", "BF16": "bfloat16", "FLOAT": "float32", "INT32": "int32", "INT64": "int64", "INT8": "int8",
         "FP8": "float8_e4m3fn"}
FIX = "report it with the bundle's gqa_export.json: the engine was not kept"


def expected_aliases(manifest: Manifest) -> dict[str, str]:
    """present -> past, of every layer that has a cache."""
    pairs = [zip(present_names(layer.layer), past_names(layer.layer), strict=True) for layer in manifest.spec.owners]
    return {present: past for pair in pairs for present, past in pair}


def check(manifest: Manifest, built: Built, log: Log, profiles: int, *, plugin: bool) -> None:
    """Check a built engine against its bundle.

    Args:
        manifest: of the bundle.
        built: facts of TensorRT's network.
        log: the build log; without layers nothing is checked there.
        profiles: their number.
        plugin: whether attention is the plugin's.

    Raises:
        GqaExportError: something differs; names the first.
    """
    for side, facts, tensors in (("input", manifest.inputs, built.inputs), ("output", manifest.outputs, built.outputs)):
        wrong = [f"{side} {fact.name}" for fact, tensor in zip(facts, tensors) if not _same(fact, tensor)]
        if wrong or len(facts) != len(tensors):
            names = ", ".join(wrong[:3]) or f"number of {side}s ({len(tensors)}, expected {len(facts)})"
            raise GqaExportError(f"TensorRT's network has another {names} than the bundle", "the engine", FIX,
                                 code="E-ENGINE-TENSORS")
    aliases = expected_aliases(manifest)
    if built.aliases != aliases:
        odd = sorted(set(built.aliases.items()) ^ set(aliases.items()))[0]
        raise GqaExportError(f"the cache would not be written in place: {odd[0]}", "the engine's aliases", FIX,
                             code="E-ENGINE-BUILD-ALIAS")
    layers = len(manifest.spec.layers)
    if plugin and built.plugin_layers != layers:
        raise GqaExportError(f"the network has {built.plugin_layers} plugin layers, expected {layers}", "the engine",
                             FIX, code="E-ENGINE-PLUGIN-LAYERS")
    if plugin and built.containers != 1:
        raise GqaExportError(f"the engine carries its kernels {built.containers} times, expected once", "the engine",
                             FIX, code="E-ENGINE-BUILD-KERNELS")
    if not log.layers:
        return
    for number in range(profiles):
        if plugin and log.plugins(number) != layers:
            raise GqaExportError(f"profile {number} has {log.plugins(number)} plugin layers, expected {layers}",
                                 "the build log", FIX, code="E-ENGINE-PLUGIN-LAYERS")
    copies = log.copies({*aliases, *aliases.values()})
    if copies:
        raise GqaExportError(f"TensorRT copies the cache: {copies[0]} ({len(copies)} such layers)", "the build log",
                             FIX, code="E-ENGINE-COPY")


def check_collectives(model: onnx.ModelProto, log: Log, profiles: int) -> list[str]:
    """Check that an engine meets the other ranks as its graph does, in the same order and nowhere else.

    Args:
        model: the graph it was built from.
        log: the build log; without layers nothing is checked.
        profiles: their number.

    Returns:
        The kinds of the engine's collectives, in order: of the layer list, or of the graph where that is empty.

    Raises:
        GqaExportError: a profile has others.
    """
    wanted = [(each.split()[0], each.rpartition(": ")[2]) for each in collective_order(model)]
    for number in range(profiles if log.layers else 0):
        found = log.collectives(number)
        pairs = itertools.zip_longest(found, wanted, fillvalue=("nothing", ""))
        # TensorRT puts something behind the names of the layers that it makes of nodes
        odd = next((pair for pair in pairs if pair[0][0] != pair[1][0] or not pair[0][1].startswith(pair[1][1])), None)
        if odd is not None:
            raise GqaExportError(f"profile {number} meets the other ranks at {odd[0]}, expected {odd[1]}",
                                 "the build log", FIX, code="E-ENGINE-COLLECTIVES")
    return [kind for kind, _ in wanted]


def check_alike(facts: list[EngineFacts], manifest: Manifest) -> None:
    """Check that the engines of all ranks can run together.

    Raises:
        GqaExportError: their profiles or collectives differ.
    """
    for rank, one in enumerate(facts):
        same = one.aliases == facts[0].aliases and one.build.get("collectives") == facts[0].build.get("collectives")
        if not same or [each.name for each in one.profiles] != [each.name for each in facts[0].profiles]:
            raise GqaExportError(f"the engine of rank {rank} is not made like that of rank 0", manifest.target, FIX,
                                 code="E-ENGINE-RANKS")


def _same(fact: TensorFact, tensor: Tensor) -> bool:
    sizes = tuple(-1 if isinstance(axis, str) else axis for axis in fact.shape)
    return fact.name == tensor.name and TYPES.get(tensor.type) == fact.dtype and sizes == tensor.shape


def coded_products(model: onnx.ModelProto, log: Log, profiles: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """How many of a graph's products with rounded inputs are products of codes in the engine, by profile; and a line
    for those that are not, which dequantize what was rounded. Nothing where the graph rounds none, or no log was read.

    Args:
        model: the graph.
        log: of the build.
        profiles: their names, in order.
    """
    wanted = rounding_products(model)
    if not wanted or not log.layers:
        return {}, []
    found = {name: wanted & log.products_of_codes(number) for number, name in enumerate(profiles)}
    lines = [f"{name}: TensorRT multiplies codes in {len(nodes)} of {len(wanted)} products whose inputs are rounded; "
             f"others dequantize them first: {', '.join(sorted(wanted - nodes)[:3])}"
             for name, nodes in found.items() if nodes < wanted]
    return {name: len(nodes) for name, nodes in found.items()}, lines
