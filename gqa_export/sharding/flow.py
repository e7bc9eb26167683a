"""What each rank has of every tensor that is not cut: the whole, a summand of it, or its own experts' share of it.

A summand is added up over the ranks (`all_reduce`) where something reads it that is not linear. A share is right where
the rank holds the chosen expert and anything elsewhere; with zeros there it is a summand.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx

from ..errors import UnsupportedModel
from .facts import Cut
from .plan import FIX, Plan
from .rules import ELEMENTWISE, reduced_axes
from .taken import pieces
from .view import View, attribute, attributes, is_attention, label

SUMMED = "/all_reduce.0"
"""what the name of a sum over the ranks has behind that of its summand"""
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Neg", "ReduceSum", "Slice", "Split", "Expand")
"""linear operators of one tensor"""
FOLLOWS = (*ELEMENTWISE, "MatMul", "Squeeze", "Unsqueeze", "Split", "Slice", "Concat", "Transpose", "Softmax",
           "Reshape")
"""operators that work for each choice by itself, if the leading axes stay"""


@dataclass(frozen=True)
class Choice:
    """Whose experts a tensor's leading axes belong to: the tensor that names them, its trailing axis of one entry (of
    GatherND) or not, and how many axes it has without that."""

    index: str
    pairs: bool
    axes: int
    held: Cut


@dataclass
class Flow:
    """Of a plan, what happens where.

    Attributes:
        summed: tensors that are added up over the ranks, in graph order.
        masked: tensors that get zeros where another rank holds the expert.
        inputs: by position of a node, which of its inputs are read summed or masked.
        means: positions of the ReduceMeans over a cut axis, with the number that each rank's sum is divided by.
        choices: tensors that are a share.
    """

    summed: dict[str, None] = field(default_factory=dict)
    masked: dict[str, Choice] = field(default_factory=dict)
    inputs: dict[int, set[str]] = field(default_factory=dict)
    means: dict[int, int] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)


def follow(plan: Plan) -> Flow:
    """Go through the graph once, in its order.

    Raises:
        UnsupportedModel: a summand or a share meets a cut.
    """
    flow, sums = Flow(), set[str]()
    for position, node in enumerate(plan.view.nodes):
        if is_attention(node):
            _settle(flow, sums, position, node, list(node.input))
            continue
        if node.op_type in ("Gather", "GatherND") and plan.cuts.get(node.input[0], Cut(1, ())).axis == 0 \
                and node.input[0] in plan.view.initializers:
            _settle(flow, sums, position, node, [node.input[1]])
            pairs = node.op_type == "GatherND"
            axes = len(plan.view.shape(node.input[1])) - pairs
            flow.choices[node.output[0]] = Choice(node.input[1], pairs, axes, plan.cuts[node.input[0]])
            continue
        shares = [name for name in node.input if name in flow.choices and name not in flow.masked]
        if shares and not _still_a_share(plan, flow, sums, node, shares):
            for name in shares:
                flow.masked[name] = flow.choices[name]
                sums.add(name)
            shares = []
        if shares:
            flow.choices.update(dict.fromkeys(node.output, flow.choices[shares[0]]))
            continue
        flow.inputs.setdefault(position, set()).update(name for name in node.input if name in flow.masked)
        summands = [name for name in node.input if name in sums and name not in flow.summed]
        if summands and _linear(plan.view, node, summands):
            sums.update(node.output)
            continue
        _settle(flow, sums, position, node, list(node.input))
        if _adds_up(plan, flow, position, node):
            sums.add(node.output[0])
    unfinished = sorted((sums | set(flow.choices)) & plan.view.outputs)
    if unfinished:
        raise UnsupportedModel(f"each rank has a summand only of the output {unfinished[0]!r}", unfinished[0], FIX,
                               code="E-MODEL-SHARD-RULE")
    return flow


def _settle(flow: Flow, sums: set[str], position: int, node: onnx.NodeProto, names: list[str]) -> None:
    """Let a node read wholes."""
    for name in names:
        if name in flow.choices and name not in flow.masked:
            flow.masked[name] = flow.choices[name]
            sums.add(name)
        if name in sums:
            flow.summed.setdefault(name)
            flow.inputs.setdefault(position, set()).add(name)


def _still_a_share(plan: Plan, flow: Flow, sums: set[str], node: onnx.NodeProto, shares: list[str]) -> bool:
    choice = flow.choices[shares[0]]
    if node.op_type not in FOLLOWS or any(flow.choices[name] != choice for name in shares):
        return False
    if any(name in sums or name in plan.cuts for name in (*node.input, *node.output)):
        return False
    return _keeps_leading(plan.view, node, max(len(plan.view.shape(share)) for share in shares), choice.axes)


def _keeps_leading(view: View, node: onnx.NodeProto, rank: int, axes: int) -> bool:
    """Whether the first `axes` axes of a node's output are those of its input, which has `rank`."""
    if node.op_type == "MatMul":
        return len(view.shape(node.output[0])) == rank >= axes + 2
    if node.op_type in ("Squeeze", "Unsqueeze"):
        moved = view.numbers(node.input[1]) if len(node.input) > 1 else None
        longer = max(rank, len(view.shape(node.output[0])))
        return moved is not None and all(axis % longer >= axes for axis in moved)
    if node.op_type in ("Split", "Concat", "Softmax"):
        return attribute(node, "axis", -1 if node.op_type == "Softmax" else 0) % rank >= axes
    if node.op_type == "Slice":
        return all(axis >= axes for _, axis, _, _ in pieces(view, node))
    if node.op_type == "Transpose":
        return attributes(node, "perm")[:axes] == list(range(axes))
    if node.op_type == "Reshape":
        return (view.numbers(node.input[1]) or [])[:axes] == [0] * axes
    return len(view.shape(node.output[0])) == rank


def _linear(view: View, node: onnx.NodeProto, summands: list[str]) -> bool:
    """Whether a node makes summands of its output from summands of its inputs."""
    if node.op_type in MOVES:
        return summands == [node.input[0]]
    if node.op_type in ("Add", "Sub", "Sum"):
        return set(summands) == set(node.input)
    if node.op_type in ("Mul", "Div"):
        return summands == [node.input[0] if node.op_type == "Div" or node.input[0] in summands else node.input[1]] \
            and view.shape(node.output[0]) == view.shape(summands[0]) and node.input[0] != node.input[1]
    return False


def _adds_up(plan: Plan, flow: Flow, position: int, node: onnx.NodeProto) -> bool:
    """Whether each rank's output of a node is a summand: it sums over a cut axis."""
    view, cuts = plan.view, plan.cuts
    if node.op_type == "MatMul":
        cut = cuts.get(node.input[0])
        found = cut is not None and cut.axis == len(view.shape(node.input[0])) - 1
    elif node.op_type in ("ReduceSum", "ReduceMean") and node.input[0] in cuts:
        cut = cuts[node.input[0]]
        found = cut.axis in reduced_axes(view, node)
        if found:
            flow.means[position] = _divisor(plan, node, cut)
    else:
        return False
    if found and node.output[0] in cuts:
        raise UnsupportedModel("a sum over a cut axis is itself cut", label(node), FIX, code="E-MODEL-SHARD-RULE")
    return found


def _divisor(plan: Plan, node: onnx.NodeProto, cut: Cut) -> int:
    """What a rank's sum over its entries is divided by: how often each entry is held and, of a mean, how many there
    are."""
    from math import prod

    from .facts import copies

    shape = plan.view.shape(node.input[0])
    held = copies(cut.parts, int(str(shape[cut.axis])))
    if node.op_type == "ReduceSum":
        return held
    sizes = [shape[axis] for axis in reduced_axes(plan.view, node)]
    if not all(isinstance(size, int) for size in sizes):
        raise UnsupportedModel("a mean over a cut axis and one of unknown size", label(node), FIX,
                               code="E-MODEL-SHARD-RULE")
    return held * prod(int(str(size)) for size in sizes)
