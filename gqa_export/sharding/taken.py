"""Slice and Split: what a cut of the whole means for its parts, and cuts of the parts for the whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import onnx

from .facts import CannotShard, Cut, joined
from .view import View, attribute, label

Cuts = Mapping[str, Cut]


def pieces(view: View, node: onnx.NodeProto) -> Iterator[tuple[str, int, int, int]]:
    """Of a Slice or Split, what it takes: the output's name, the axis, and where it begins and ends there.

    Raises:
        CannotShard: the bounds are not constants, or it takes every other entry.
    """
    shape = view.shape(node.input[0])
    if node.op_type == "Split":
        axis = attribute(node, "axis", 0) % len(shape)
        size = shape[axis]
        sizes = view.numbers(node.input[1]) if len(node.input) > 1 else None
        if sizes is None:
            if not isinstance(size, int):
                raise CannotShard(label(node), "the parts of a Split are not constants")
            part = -(-size // len(node.output))
            sizes = [min(part, size - place * part) for place in range(len(node.output))]
        start = 0
        for name, count in zip(node.output, sizes):
            yield name, axis, start, start + count
            start += count
        return
    bounds = [view.numbers(name) if name else None for name in node.input[1:]]
    starts, stops = bounds[:2]
    axes = bounds[2] if len(bounds) > 2 and bounds[2] is not None else list(range(len(starts or ())))
    steps = bounds[3] if len(bounds) > 3 and bounds[3] is not None else [1] * len(axes)
    if starts is None or stops is None:
        yield node.output[0], -1 if not axes else axes[0] % len(shape), -1, -1
        return
    for start, stop, axis, step in zip(starts, stops, axes, steps):
        size = shape[axis % len(shape)]
        if isinstance(size, int):
            first, last, _ = slice(start, stop, step).indices(size)
            yield node.output[0], axis % len(shape), first if step == 1 else -1, last
        else:
            yield node.output[0], axis % len(shape), -1, -1


def taken(view: View, node: onnx.NodeProto, cuts: Cuts) -> dict[str, Cut]:
    """Slice and Split. Along the cut axis only forward: what a whole is cut into is known when all its parts are
    (`packed`)."""
    whole = node.input[0]
    mine = list(pieces(view, node))
    along = {axis for _, axis, _, _ in mine}
    known = [cuts[name] for name in (whole, *node.output) if name in cuts and cuts[name].axis not in along]
    if known:
        return dict.fromkeys((whole, *node.output), known[0])
    found: dict[str, Cut] = {}
    for name, axis, start, stop in mine if whole in cuts else ():
        if axis == cuts[whole].axis:
            if start < 0:
                raise CannotShard(label(node), "it takes entries of the cut axis at places that are not constants")
            found[name] = Cut(axis, tuple(joined([(max(a, start) - start, min(b, stop) - start)
                                                  for a, b in part if a < stop and b > start])
                                          for part in cuts[whole].parts))
    return found


def packed(view: View, whole: str, axis: int, cuts: Cuts) -> Cut | None:
    """The cut of a tensor that is taken apart along `axis`, from those of its parts; a part without one is whole.
    None where no part is cut.

    Raises:
        CannotShard: something else reads the tensor, or two parts overlap.
    """
    parts: list[tuple[int, int, str]] = []
    size = view.size(whole, axis)
    for node in view.read_by.get(whole, ()):
        mine = list(pieces(view, node)) if node.op_type in ("Slice", "Split") else []
        along = [(start, stop, name) for name, at, start, stop in mine if at == axis]
        if not along or len(along) != len(mine) or any(start < 0 for start, _, _ in along):
            raise CannotShard(label(node), f"it reads {whole!r}, parts of which are cut")
        parts += along
    if not any(name in cuts for _, _, name in parts):
        return None
    parts.sort()
    if any(before[1] > after[0] for before, after in itertools.pairwise(parts)) or not isinstance(size, int):
        raise CannotShard("", f"parts of {whole!r} overlap")
    ranks = len(next(cuts[name].parts for _, _, name in parts if name in cuts))
    held: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for start, stop, name in parts:
        for r in range(ranks):
            if name not in cuts:
                held[r].append((start, stop))
            elif cuts[name].axis == axis:
                held[r] += [(start + a, start + b) for a, b in cuts[name].parts[r]]
            else:
                raise CannotShard("", f"a part of {whole!r} is cut along another axis")
    return Cut(axis, tuple(joined(ranges) for ranges in held))
