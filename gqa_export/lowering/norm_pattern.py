"""What an RMS norm looks like in a traced graph, and where a piece of a graph that looks like one departs from it.

    x -> Pow -> ReduceMean -> Add -> Sqrt -> Reciprocal -> Mul (by x) -> Cast? -> Mul (by the weight)

The fusions of `ort` (over onnx_ir) and `onnx` (over graphsurgeon) match it in their own way; what they leave is looked
at here, by a view of the graph that both can give.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from ..graph.passes import NearMiss

Node = TypeVar("Node")
MEAN = "ReduceMean"
AFTER = ("Add", "Sqrt", "Reciprocal", "Mul", "Mul")
"""the operators from the mean to the norm's result, Casts left out"""


class View(Protocol[Node]):
    """A graph as far as the pattern needs it. Operators of other domains have their domain before them."""

    def nodes(self) -> Iterable[Node]:
        """All nodes that an output depends on."""

    def op(self, node: Node) -> str:
        """The operator of a node."""

    def name(self, node: Node) -> str:
        """The name of a node."""

    def makers(self, node: Node) -> list[Node]:
        """The nodes whose outputs it reads."""

    def readers(self, node: Node) -> list[Node]:
        """The nodes that read its outputs."""

    def why_not(self, node: Node) -> NearMiss:
        """Where and why the fusion did not take the norm whose last Mul is `node`, its operators being right."""


def norms_left(view: View[Node]) -> tuple[NearMiss, ...]:
    """The places that look like an RMS norm and were not fused, each named by the node where it departs from one."""
    return tuple(miss for node in view.nodes() if view.op(node) == MEAN and (miss := _departure(view, node)))


def _departure(view: View[Node], mean: Node) -> NearMiss | None:
    squares = [node for node in view.makers(mean) if view.op(node) != "Constant"]
    after_mean = view.readers(mean)
    squared = any(view.op(node) == "Pow" for node in squares)
    rooted = any(view.op(root) == "Sqrt" for node in after_mean for root in view.readers(node))
    if not squared and not rooted:
        return None
    if not squared and squares:
        return NearMiss(view.name(squares[0]), f"it is {view.op(squares[0])}, an RMS norm has Pow there")
    node = mean
    for wanted in AFTER:
        readers = view.readers(node)
        narrowed = [reader for reader in readers if view.op(reader) == "Cast"]
        readers += [reader for cast in narrowed for reader in view.readers(cast)]
        following = [reader for reader in readers if view.op(reader) == wanted]
        if not following:
            others = [reader for reader in readers if reader not in narrowed]
            if not others:
                return NearMiss(view.name(node), f"no node reads it, an RMS norm has {wanted} there")
            return NearMiss(view.name(others[0]), f"it is {view.op(others[0])}, an RMS norm has {wanted} there")
        node = following[0]
    return view.why_not(node)
