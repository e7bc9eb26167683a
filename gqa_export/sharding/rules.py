"""What a cut of one tensor of a node means for its other tensors: one rule an operator.

A rule is `rule(view, node, cuts) -> {tensor: Cut}`: from the cuts that are known, those that follow, in both
directions. A tensor that is not among them is whole on every rank. `CannotShard` where nothing follows. An operator
that is not in RULES has none.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx

from .facts import CannotShard, Cut, copies, through_reshape
from .taken import Cuts, taken
from .view import View, attribute, attributes, is_attention, label

Rule = Callable[[View, onnx.NodeProto, Cuts], dict[str, Cut]]


def elementwise(view: View, node: onnx.NodeProto, cuts: Cuts) -> dict[str, Cut]:
    """Every tensor that has the cut axis, and not a size of 1 there, is cut alike."""
    found: dict[str, Cut] = {}
    for known in ports(node):
        if known not in cuts:
            continue
        cut, shape = cuts[known], view.shape(known)
        from_end, size = len(shape) - cut.axis, shape[cut.axis]
        for name in ports(node):
            if name not in view.shapes:
                raise CannotShard(label(node), f"the shape of {name!r} is not known")
            place = len(view.shape(name)) - from_end
            if place >= 0 and view.size(name, place) == size:
                found[name] = cut.at(place)
            elif name in node.output:
                raise CannotShard(label(node), f"its output has {view.size(name, place)} entries where an input has "
                                  f"{size}")
    return found


def ports(node: onnx.NodeProto) -> list[str]:
    """Names of all inputs and outputs of a node that are there."""
    return [name for name in (*node.input, *node.output) if name]


def first_to_first(move: Callable[[View, onnx.NodeProto, Cut, bool], Cut | None]) -> Rule:
    """A rule of an operator that rearranges its first input into its first output. move: the cut of the other side;
    its last argument is whether that is the output."""
    def rule(view: View, node: onnx.NodeProto, cuts: Cuts) -> dict[str, Cut]:
        found: dict[str, Cut] = {}
        for one, other, forward in ((node.input[0], node.output[0], True), (node.output[0], node.input[0], False)):
            if one in cuts:
                cut = move(view, node, cuts[one], forward)
                if cut is None:
                    raise CannotShard(label(node), f"a cut of axis {cuts[one].axis} of {list(view.shape(one))} is not "
                                      f"one of an axis of {list(view.shape(other))}")
                found[other] = cut
        return found
    return rule


def _reshape(view: View, node: onnx.NodeProto, cut: Cut, forward: bool) -> Cut | None:
    before, after = view.shape(node.input[0]), view.shape(node.output[0])
    return through_reshape(cut, *((before, after) if forward else (after, before)))


def _transpose(view: View, node: onnx.NodeProto, cut: Cut, forward: bool) -> Cut | None:
    order = attributes(node, "perm") or list(reversed(range(len(view.shape(node.input[0])))))
    return cut.at(order.index(cut.axis) if forward else order[cut.axis])


def _squeeze(view: View, node: onnx.NodeProto, cut: Cut, forward: bool) -> Cut | None:
    """Squeeze and Unsqueeze: axes of one entry come and go."""
    one, other = (node.input[0], node.output[0]) if forward else (node.output[0], node.input[0])
    longer = node.input[0] if node.op_type == "Squeeze" else node.output[0]
    rank = len(view.shape(longer))
    axes = view.numbers(node.input[1]) if len(node.input) > 1 else None
    if axes is None:
        return None
    gone = {axis % rank for axis in axes}
    kept = [axis for axis in range(rank) if axis not in gone]
    del other
    if one == longer:
        return cut.at(kept.index(cut.axis)) if cut.axis in kept else None
    return cut.at(kept[cut.axis])


def expand(view: View, node: onnx.NodeProto, cuts: Cuts) -> dict[str, Cut]:
    """Expand: an axis that it widens is whole before it."""
    known, rest = node.output[0], node.input[0]
    if rest in cuts:
        cut = cuts[rest].at(cuts[rest].axis + len(view.shape(known)) - len(view.shape(rest)))
        return {known: cut}
    if known not in cuts:
        return {}
    place = cuts[known].axis - len(view.shape(known)) + len(view.shape(rest))
    if place < 0 or view.size(rest, place) == 1:
        return {}
    return {rest: cuts[known].at(place)}


def concat(view: View, node: onnx.NodeProto, cuts: Cuts) -> dict[str, Cut]:
    """Concat: along another axis, all are cut alike."""
    axis = attribute(node, "axis", 0) % len(view.shape(node.output[0]))
    known = [cuts[name] for name in ports(node) if name in cuts]
    if any(cut.axis == axis for cut in known):
        raise CannotShard(label(node), "it joins tensors along the axis that is cut")
    return dict.fromkeys(ports(node), known[0])


def matmul(view: View, node: onnx.NodeProto, cuts: Cuts) -> dict[str, Cut]:
    """MatMul: rows and columns follow the output's, the axis that is summed over is the same in both factors."""
    left, right, out = node.input[0], node.input[1], node.output[0]
    ranks = {name: len(view.shape(name)) for name in (left, right, out)}
    if min(ranks[left], ranks[right]) < 2:
        raise CannotShard(label(node), "a factor is a vector")
    found: dict[str, Cut] = {}
    for name in (left, right, out):
        if name not in cuts:
            continue
        cut, from_end = cuts[name], ranks[name] - cuts[name].axis
        if name == left and from_end == 1:
            found[right] = cut.at(ranks[right] - 2)
        elif name == right and from_end == 2:
            found[left] = cut.at(ranks[left] - 1)
        else:
            mates = {1: (right, out), 2: (left, out)}.get(from_end, (left, right, out))
            for other in mates:
                place = ranks[other] - from_end
                if other != name and place >= 0 and view.size(other, place) != 1:
                    found[other] = cut.at(place)
    if left in cuts and cuts[left].axis == ranks[left] - 1:
        if out in cuts or out in found:
            raise CannotShard(label(node), "its factors and its product are both cut")
        if copies(cuts[left].parts, int(str(view.size(left, ranks[left] - 1)))) != 1:
            raise CannotShard(label(node), "it sums over entries that several ranks hold")
    return found


def reduction(view: View, node: onnx.NodeProto, cuts: Cuts) -> dict[str, Cut]:
    """ReduceMean and ReduceSum: over the cut axis each rank has a summand, whole otherwise."""
    whole, out = node.input[0], node.output[0]
    axes = reduced_axes(view, node)
    keep = attribute(node, "keepdims", 1)
    found: dict[str, Cut] = {}
    rank = len(view.shape(whole))
    kept = [axis for axis in range(rank) if keep or axis not in axes]
    if whole in cuts and cuts[whole].axis not in axes:
        found[out] = cuts[whole].at(kept.index(cuts[whole].axis))
    elif whole in cuts:
        if node.op_type not in ("ReduceSum", "ReduceMean"):
            raise CannotShard(label(node), "it reduces the cut axis by something else than a sum")
        if not copies(cuts[whole].parts, int(str(view.size(whole, cuts[whole].axis)))):
            raise CannotShard(label(node), "it sums over entries, some of which more ranks hold than others")
        if out in cuts:
            raise CannotShard(label(node), "its output is cut, and so is the axis that it sums over")
    elif out in cuts:
        found[whole] = cuts[out].at(kept[cuts[out].axis])
    return found


def reduced_axes(view: View, node: onnx.NodeProto) -> set[int]:
    """The axes that a reduction removes, counted from the front."""
    rank = len(view.shape(node.input[0]))
    given = view.numbers(node.input[1]) if len(node.input) > 1 and node.input[1] else attributes(node, "axes")
    if given is None:
        raise CannotShard(label(node), "its axes are not constants")
    return {axis % rank for axis in given} or set(range(rank))


def along_last(view: View, node: onnx.NodeProto, cuts: Cuts) -> dict[str, Cut]:
    """Softmax and the like, the standard's norms: what they sum over must be whole; their weights are of that axis."""
    axis = attribute(node, "axis", -1) % len(view.shape(node.input[0]))
    last = "Normalization" in node.op_type
    found = {}
    for one, other in ((node.input[0], node.output[0]), (node.output[0], node.input[0])):
        if one in cuts:
            if cuts[one].axis >= axis if last else cuts[one].axis == axis:
                raise CannotShard(label(node), "it works along the axis that is cut")
            found[other] = cuts[one]
    return found


def gather(view: View, node: onnx.NodeProto, cuts: Cuts) -> dict[str, Cut]:
    """GatherND by one index, Gather: along the leading axis each rank has entries of its own (the experts); every
    other axis stays as it is."""
    data, index, out = node.input[0], node.input[1], node.output[0]
    pairs = node.op_type == "GatherND"
    places = len(view.shape(index)) - pairs
    axis = 0 if pairs else attribute(node, "axis", 0) % len(view.shape(data))
    if index in cuts or attribute(node, "batch_dims", 0) or (pairs and view.size(index, places) != 1):
        raise CannotShard(label(node), "it picks by an index that is cut, or by several")
    found: dict[str, Cut] = {}
    if data in cuts and cuts[data].axis == axis:
        if axis or data not in view.initializers:
            raise CannotShard(label(node), "it picks entries of an axis that is cut")
    elif data in cuts:
        found[out] = cuts[data].at(cuts[data].axis + (places - 1 if cuts[data].axis > axis else 0))
    if out in cuts:
        place = cuts[out].axis
        if axis <= place < axis + places:
            raise CannotShard(label(node), "the entries that it picks are cut")
        found[data] = cuts[out].at(place - (places - 1 if place > axis else 0))
    return found


def attention(view: View, node: onnx.NodeProto, cuts: Cuts) -> dict[str, Cut]:
    """The canonical attention op: its cuts are seeds, by heads."""
    return {}


def scatter(view: View, node: onnx.NodeProto, cuts: Cuts) -> dict[str, Cut]:
    """ScatterND by one index: the axis that it writes along is whole, the others are cut alike."""
    data, index, updates, out = node.input[0], node.input[1], node.input[2], node.output[0]
    places = len(view.shape(index)) - 1
    if index in cuts or view.size(index, places) != 1:
        raise CannotShard(label(node), "it writes by an index that is cut, or by several")
    axes = {cuts[name].axis: cuts[name] for name in (data, out) if name in cuts}
    if updates in cuts:
        axes[cuts[updates].axis - places + 1] = cuts[updates]
    found: dict[str, Cut] = {}
    for axis, cut in axes.items():
        if axis < 1:
            raise CannotShard(label(node), "it writes along the axis that is cut")
        found.update({data: cut.at(axis), out: cut.at(axis), updates: cut.at(axis - 1 + places)})
    return found


def made_whole(view: View, node: onnx.NodeProto, cuts: Cuts) -> dict[str, Cut]:
    """ConstantOfShape: made in the size that each rank has."""
    return {}


def nothing(view: View, node: onnx.NodeProto, cuts: Cuts) -> dict[str, Cut]:
    """Shape: sizes of axes that are not cut."""
    cut = cuts.get(node.input[0])
    if cut is not None:
        rank = len(view.shape(node.input[0]))
        start, end = attribute(node, "start", 0), attribute(node, "end", rank)
        first, last, _ = slice(start, end).indices(rank)
        readers = view.read_by.get(node.output[0], [])
        picked = [view.numbers(reader.input[1]) if reader.op_type == "Gather" else None for reader in readers]
        others = bool(readers) and all(each is not None and cut.axis - first not in each for each in picked)
        if first <= cut.axis < last and not others:
            raise CannotShard(label(node), "it reads the size of the axis that is cut")
    return {}


ELEMENTWISE = (
    "Abs", "Add", "And", "Cast", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu",
    "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsNaN", "LeakyRelu", "Less", "LessOrEqual",
    "Log", "Max", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Selu",
    "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu",
    "Where",
)  # fmt: skip
RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    "Reshape": first_to_first(_reshape), "Transpose": first_to_first(_transpose),
    "Squeeze": first_to_first(_squeeze), "Unsqueeze": first_to_first(_squeeze),
    "Expand": expand, "Slice": taken, "Split": taken, "Concat": concat, "MatMul": matmul,
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), reduction),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization"), along_last),
    "Gather": gather, "GatherND": gather, "ScatterND": scatter, "ConstantOfShape": made_whole, "Shape": nothing,
}  # fmt: skip
"""operator -> its rule"""


def rule_of(node: onnx.NodeProto) -> Rule:
    """The rule of a node.

    Raises:
        CannotShard: its operator has none.
    """
    if is_attention(node):
        return attention
    if node.domain or node.op_type not in RULES:
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise CannotShard(label(node), f"{name} has no rule for an axis that is cut")
    return RULES[node.op_type]
