"""Who reads the stacked matrices of experts: products with those that a router chose for each row, and products with
all of them.

Axes: E experts, N and K rows and columns of an expert's matrix, P pairs of a token and an expert that was chosen for
it, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from ...graph import match
from ...graph.known_shape import Shape, known_shape
from ...quantized.experts import stack_in

SWAP = [0, 2, 1]


@dataclass(frozen=True, eq=False)
class ExpertProduct:
    """`node` = matrices of experts times x.

    Attributes:
        node: a MatMul.
        name: of the parameter.
        experts: E.
        x: where `ids` chooses, `[.., K]`; else `[E, T, K]`, rows of each expert.
        ids: int64, the expert of each row of x; None: every expert has rows of its own.
        flat: ids have one axis `[P]`.
        columns_last: the result is `[.., 1, N]`, not `[.., N, 1]`.
        transposed: the parameter has an expert as `[K, N]`.
    """

    node: gs.Node
    name: str
    experts: int
    x: gs.Tensor
    ids: gs.Tensor | None
    flat: bool
    columns_last: bool
    transposed: bool


@dataclass(frozen=True, eq=False)
class _View:
    """A parameter as experts `[E, .., ..]`, after its last two axes were exchanged if `swapped`."""

    name: str
    tensor: gs.Tensor
    experts: int
    swapped: bool = False


def find_experts(graph: gs.Graph, names: Collection[str]) -> dict[str, list[ExpertProduct] | str]:
    """The products of each stacked weight in `names`, or why it is not one that can be held as codes. Weights of two
    axes that nothing makes a stack of are left out."""
    found: dict[str, list[ExpertProduct] | str] = {}
    for tensor in {id(t): t for node in graph.nodes for t in node.inputs if match.is_weight(t)}.values():
        name = match.recipe(tensor)
        if name not in names:
            continue
        views = _views(name, tensor)
        if not views:
            continue
        products: list[ExpertProduct] = []
        reason = ""
        for view in views:
            for node in match.consumers(view.tensor):
                each = _products(graph, view, node)
                if isinstance(each, str):
                    reason = reason or each
                else:
                    products += each
        known = found.get(name, [])
        found[name] = known if isinstance(known, str) else reason or [*known, *products]
    return found


def _views(name: str, tensor: gs.Tensor) -> list[_View]:
    """The stack that a weight is, or those that its readers make of it by Reshape."""
    if len(tensor.shape) == 3:
        return [_View(name, tensor, tensor.shape[0])]
    readers = match.consumers(tensor)
    views = []
    for node in readers:
        shape = match.const_value(node.inputs[1]) if match.is_op(node, "Reshape") else None
        stack = None if shape is None else stack_in(tensor.shape, shape.tolist())
        if stack is None:
            return []
        views.append(_View(name, node.outputs[0], stack[0]))
    return views


def _products(graph: gs.Graph, view: _View, node: gs.Node) -> list[ExpertProduct] | str:
    """The products behind a reader of a view, or which operator reads it otherwise."""
    if match.is_op(node, "Transpose") and list(node.attrs.get("perm", [])) == SWAP:
        swapped = _View(view.name, node.outputs[0], view.experts, not view.swapped)
        found: list[ExpertProduct] = []
        for reader in match.consumers(swapped.tensor):
            each = _products(graph, swapped, reader)
            if isinstance(each, str):
                return each
            found += each
        return found
    if match.is_op(node, "MatMul") and node.inputs[1] is view.tensor and node.inputs[0] is not view.tensor:
        shape = known_shape(node.inputs[0])
        if shape is None or len(shape) != 3 or shape[0] != view.experts:
            return ("a product with all of them has an input that is not known to be rows of each expert, "
                    f"[{view.experts}, rows, columns]")
        return [ExpertProduct(node, view.name, view.experts, node.inputs[0], None, False, True, not view.swapped)]
    ids = _ids(node, view)
    if ids is None:
        return f"{node.op} reads it"
    picked = node.outputs[0]
    readers = match.consumers(picked)
    if not readers or match.is_output(graph, picked):
        return "matrices that were picked by index are read by nothing"
    products, chosen = [], known_shape(ids)
    rank = len(chosen or ())
    for reader in readers:
        if not match.is_op(reader, "MatMul") or (reader.inputs[0] is picked) == (reader.inputs[1] is picked):
            return f"{reader.op} reads matrices that were picked by index"
        first = reader.inputs[0] is picked
        x = _without_axis(reader.inputs[1 if first else 0], -1 if first else -2, rank + 1 if rank else 0)
        if x is None:
            return "a matrix that was picked by index multiplies more than one row"
        if not _one_for_each(known_shape(x), chosen):
            return "matrices that were picked by index do not multiply one row each"
        products.append(ExpertProduct(reader, view.name, view.experts, x, ids, rank == 1, not first,
                                      view.swapped == first))
    return products


def _ids(node: gs.Node, view: _View) -> gs.Tensor | None:
    """The indices by which a node picks matrices of a view; None where it does something else."""
    if match.is_op(node, "GatherND") and node.inputs[0] is view.tensor and not node.attrs.get("batch_dims", 0):
        return _without_axis(node.inputs[1], -1, None)
    if match.is_op(node, "Gather") and node.inputs[0] is view.tensor and not node.attrs.get("axis", 0):
        return node.inputs[1]
    return None


def _without_axis(tensor: gs.Tensor, axis: int, rank: int | None) -> gs.Tensor | None:
    """A tensor before an axis of one was put in, counted from the end; None where it was not. rank: the tensor's
    before that, 0 where it is not known; None: the axis is the last in any case."""
    node = match.produced_by(tensor, "Unsqueeze")
    axes = match.const_value(node.inputs[1]) if node is not None else None
    if node is None or axes is None or axes.size != 1:
        return None
    place = int(axes.reshape(-1)[0])
    fits = place == axis or rank is None or (rank and place == rank + 1 + axis)
    return node.inputs[0] if fits else None


def _one_for_each(rows: Shape | None, ids: Shape | None) -> bool:
    """Whether rows go to indices one by one, as far as is known. Those of several axes of indices are repeated where
    they are too few (`[.., 1, K]`); those of one axis are taken as they are."""
    if rows is None or not ids:
        return True
    if len(ids) > 1:
        return len(rows) <= len(ids) + 1
    return len(rows) == 2 and (rows[0] != 1 or ids[0] == 1)
