"""A bundle's facts of its ranks: the entry `parallel` of `gqa_export.json`, and how it is held against the graphs.

A bundle that is cut over R ranks has a folder `rank{r}` with a graph for each, and one manifest, whose spec, inputs and
outputs are those of the whole model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from ..errors import InvalidBundle
from ..spec import FAIL_FAST, MOST_LAYERS, STRICT, Count, Layer, Limits, Size, Text

if TYPE_CHECKING:
    import onnx

DIST_COLLECTIVE = "DistCollective"
MOST_RANKS = 1 << 10
Heads = Annotated[tuple[Count, ...], Limits(max_length=1 << 16, fail_fast=True)]
Digest = Annotated[str, Limits(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class HeldHeads:
    """Of one layer, the heads that a rank holds: query heads first_query, first_query + 1, ..., and the key/value heads
    that those read, in their order. A head may be there twice (docs/tensor-parallel.md)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    layer: Layer
    first_query: Count
    queries: Size
    kv: Heads


@dataclass(frozen=True)
class RankFacts:
    """One rank. folder: of its graph, in the bundle. heads: layer by layer. collectives_sha256: over the collectives of
    its graph in order, the same on all ranks, or they wait for one another for ever. bytes_copied, bytes_linked: of its
    weights."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    folder: Text
    heads: Annotated[tuple[HeldHeads, ...], Limits(max_length=MOST_LAYERS, fail_fast=True)]
    collectives_sha256: Digest
    bytes_copied: Count = 0
    bytes_linked: Count = 0


@dataclass(frozen=True)
class ParallelFacts:
    """How a model is cut over ranks.

    Attributes:
        ranks: in order.
        collectives: operation, tensor and shape of each, in the order in which every rank meets the others.
        vocabulary: "gathered" (each rank has rows of the head) or "whole" (each has all of it).
        whole: matrices that every rank holds whole, and why.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    ranks: Annotated[tuple[RankFacts, ...], Limits(min_length=2, max_length=MOST_RANKS, fail_fast=True)]
    collectives: Annotated[tuple[Text, ...], Limits(max_length=8 * MOST_LAYERS, fail_fast=True)]
    vocabulary: Text
    whole: Annotated[dict[Text, Text], FAIL_FAST]


def rank_folder(rank: int) -> str:
    """The folder of a rank's graph."""
    return f"rank{rank}"


def collective_order(model: onnx.ModelProto) -> tuple[str, ...]:
    """The collectives of a rank's graph, in order: operation, reduction, number of ranks and name of the node."""
    from onnx import helper

    found = []
    for node in model.graph.node:
        if node.op_type == DIST_COLLECTIVE:
            facts = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            operation, how = (bytes(facts.get(name, b"")).decode() for name in ("collective_operation", "reduce_op"))
            found.append(f"{operation} {how} of {facts.get('nb_rank', 0)}: {node.name}")
    return tuple(found)


def order_sha256(order: tuple[str, ...]) -> str:
    """sha256 over collectives in order."""
    return hashlib.sha256("\n".join(order).encode()).hexdigest()


def check_order(folder: Path, parallel: ParallelFacts, rank: int, model: onnx.ModelProto) -> None:
    """Hold the collectives of a rank's graph against the manifest.

    Raises:
        InvalidBundle: they are others, or in another order, than those of the other ranks.
    """
    order = collective_order(model)
    facts = parallel.ranks[rank]
    if order != parallel.collectives or order_sha256(order) != facts.collectives_sha256:
        place = next((i for i, (a, b) in enumerate(zip(order, parallel.collectives)) if a != b),
                     min(len(order), len(parallel.collectives)))
        found, stated = [str(each[place]) if place < len(each) else "none" for each in (order, parallel.collectives)]
        raise InvalidBundle(f"collective {place} of rank {rank} is {found}, expected {stated}: the ranks would wait "
                            "for one another for ever", str(folder / facts.folder), "export the bundle again",
                            code="E-BUNDLE-COLLECTIVES")
