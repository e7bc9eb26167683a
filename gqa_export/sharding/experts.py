"""Experts that are spread over ranks: indices counted from a rank's own, zeros where another rank has the expert."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper

from .flow import SUMMED, Choice, Flow
from .view import View

MASKED = "/own_experts.0"


class RankGraph(Protocol):
    """The graph of a rank, as it is written."""

    rank: int
    flow: Flow
    view: View
    nodes: list[onnx.NodeProto]

    def constant(self, name: str, value: np.ndarray) -> str:
        """A constant of the graph."""

    def numbers(self, numbers: list[int]) -> str:
        """Whole numbers as a constant of the graph."""


def local_index(rank: RankGraph, choice: Choice, index: str) -> str:
    """The index of experts, counted from the rank's first; of others' experts any that the rank has."""
    start, stop = choice.held.parts[rank.rank][0]
    stem, done = f"{index}/local", {node.name for node in rank.nodes[-400:]}
    if f"{stem}/last" not in done:
        dtype = helper.tensor_dtype_to_np_dtype(rank.view.types.get(choice.index, TensorProto.INT64))
        first, low, high = (rank.constant(f"experts/{dtype.name}_{number}", np.array(number, dtype))
                            for number in (start, 0, stop - start - 1))
        rank.nodes += [helper.make_node("Sub", [index, first], [f"{stem}/from"], name=f"{stem}/from"),
                       helper.make_node("Max", [f"{stem}/from", low], [f"{stem}/low"], name=f"{stem}/low"),
                       helper.make_node("Min", [f"{stem}/low", high], [f"{stem}/last"], name=f"{stem}/last")]
    return f"{stem}/last"


def own_share(rank: RankGraph, name: str, choice: Choice) -> str:
    """A share with zeros where another rank holds the expert."""
    start, stop = choice.held.parts[rank.rank][0]
    stem = name.removesuffix(".0") + "/own_experts"
    index_type = rank.view.types.get(choice.index, TensorProto.INT64)
    index_dtype = helper.tensor_dtype_to_np_dtype(index_type)
    first, end = (rank.constant(f"experts/{index_dtype.name}_{number}", np.array(number, index_dtype))
                  for number in (start, stop))
    element = rank.view.types.get(name, TensorProto.FLOAT)
    zero = rank.constant(f"experts/zero_{element}", np.zeros((), helper.tensor_dtype_to_np_dtype(element)))
    index = choice.index + SUMMED if choice.index in rank.flow.summed else choice.index
    own = f"{stem}/own"
    rank.nodes += [
        helper.make_node("Less", [index, first], [f"{stem}/before"], name=f"{stem}/before"),
        helper.make_node("Less", [index, end], [f"{stem}/until"], name=f"{stem}/until"),
        helper.make_node("Not", [f"{stem}/before"], [f"{stem}/from"], name=f"{stem}/from"),
        helper.make_node("And", [f"{stem}/from", f"{stem}/until"], [own], name=own)]
    more = len(rank.view.shape(name)) - choice.axes - choice.pairs
    if more > 0:
        axes = rank.numbers(list(range(choice.axes + choice.pairs, choice.axes + choice.pairs + more)))
        rank.nodes.append(helper.make_node("Unsqueeze", [own, axes], [f"{own}/wide"], name=f"{own}/wide"))
        own = f"{own}/wide"
    elif more < 0:
        axis = rank.numbers([choice.axes])
        rank.nodes.append(helper.make_node("Squeeze", [own, axis], [f"{own}/flat"], name=f"{own}/flat"))
        own = f"{own}/flat"
    rank.nodes.append(helper.make_node("Where", [own, name, zero], [name + MASKED], name=stem))
    return name + MASKED
