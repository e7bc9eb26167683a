"""Decomposed norms and rotations -> ai.onnx RMSNormalization and RotaryEmbedding, opset 23.

Both are matched as `transformers` writes them; what does not match stays as it is, which is right too.
Dimensions: B, S, N heads of a query or key, D head size, R rotary size.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...graph import edit, match
from ...graph.passes import NearMiss, Rewritten
from ..context import Context
from ..norm_pattern import norms_left

FLOAT = onnx.TensorProto.FLOAT


def fuse_rms_norm(graph: gs.Graph, context: Context) -> Rewritten:
    """x * rsqrt(mean(x^2) + epsilon) * weight -> RMSNormalization(x, weight)."""
    multiplications = [node for node in graph.nodes if match.is_op(node, "Mul")]
    reasons: dict[int, NearMiss] = {}
    count = sum(_fuse_norm(graph, node, reasons) for node in multiplications if node.inputs)
    return Rewritten(count, norms_left(_View(graph, reasons)))


class _View:
    """A graphsurgeon graph as `norm_pattern` looks at it. reasons: by id of a Mul that was not taken for a norm's."""

    def __init__(self, graph: gs.Graph, reasons: dict[int, NearMiss]) -> None:
        self._graph, self._reasons = graph, reasons

    def nodes(self) -> list[gs.Node]:
        return match.upstream(self._graph.outputs)[0]

    def op(self, node: gs.Node) -> str:
        return f"{node.domain}::{node.op}" if node.domain else node.op

    def name(self, node: gs.Node) -> str:
        return node.name

    def makers(self, node: gs.Node) -> list[gs.Node]:
        return [maker for tensor in node.inputs for maker in tensor.inputs]

    def readers(self, node: gs.Node) -> list[gs.Node]:
        return [reader for tensor in node.outputs for reader in match.consumers(tensor)]

    def why_not(self, node: gs.Node) -> NearMiss:
        known = (self._reasons.get(id(each)) for each in (node, *self.makers(node), *(
            maker for cast in self.makers(node) for maker in self.makers(cast))))
        return next((reason for reason in known if reason),
                    NearMiss(node.name, "it is not the product of one normalised tensor and its weight"))


def _fuse_norm(graph: gs.Graph, normalise: gs.Node, reasons: dict[int, NearMiss]) -> bool:
    for x, factor in (normalise.inputs, normalise.inputs[::-1]):
        epsilon = _reciprocal_root_mean_square(factor, x)
        if isinstance(epsilon, NearMiss):
            reasons[id(normalise)] = epsilon
            continue
        if epsilon is None:
            continue
        after, x_stored = match.sole_consumer(graph, normalise.outputs[0]), x
        widened = match.produced_by(x, "Cast")
        if after is not None and match.is_op(after, "Cast") and widened is not None:
            # x is widened to fp32, narrowed before the weight: exactly what stash_type 1 means
            x_stored, normalised = widened.inputs[0], after.outputs[0]
            after = match.sole_consumer(graph, normalised)
        else:
            normalised = normalise.outputs[0]
        if after is None or not match.is_op(after, "Mul"):
            reasons[id(normalise)] = NearMiss(normalise.name, "others read its result than one Mul by the weight")
            return False
        weight = after.inputs[1] if after.inputs[0] is normalised else after.inputs[0]
        if not _is_vector(weight):
            reasons[id(normalise)] = NearMiss(after.name, f"the weight {weight.name!r} is not known to be a vector")
            return False
        scope = after.name.rpartition("/")[0]
        fused = edit.add_node(graph, "RMSNormalization", [x_stored, weight], name=f"{scope}/RMSNormalization",
                              attrs={"axis": -1, "epsilon": epsilon, "stash_type": FLOAT})[0]
        edit.replace_uses(graph, after.outputs[0], fused)
        edit.remove(after)
        return True
    return False


def _reciprocal_root_mean_square(factor: gs.Tensor, x: gs.Tensor) -> float | NearMiss | None:
    """epsilon if `factor` is 1 / sqrt(mean(x * x, last axis) + epsilon); None if its operators are not those."""
    tensor = factor
    for op in ("Reciprocal", "Sqrt"):
        node = match.produced_by(tensor, op)
        if node is None:
            return None
        tensor = node.inputs[0]
    add = match.produced_by(tensor, "Add")
    if add is None:
        return None
    miss = None
    for mean, constant in (add.inputs, add.inputs[::-1]):
        epsilon, reduce = match.scalar(constant), match.produced_by(mean, "ReduceMean")
        if reduce is None:
            continue
        axes = match.const_value(reduce.inputs[1]) if len(reduce.inputs) > 1 else None
        square = match.produced_by(reduce.inputs[0], "Pow")
        conditions = (
            (epsilon is not None, add, "epsilon is not one constant number"),
            (reduce.attrs.get("keepdims", 1), reduce, "the mean does not keep its axis"),
            (axes is not None and axes.tolist() == [-1], reduce,
             f"the mean is taken over the axes {None if axes is None else axes.tolist()}, expected [-1]"),
            (square is not None and square.inputs[0] is x, square or reduce,
             "it is not the square of what is normalised"),
            (square is not None and match.is_scalar(square.inputs[1], 2), square or reduce, "the exponent is not 2"))
        miss = next((NearMiss(node.name, why) for holds, node, why in conditions if not holds), None)
        if miss is None and epsilon is not None:
            return float(epsilon)
    return miss


def _is_vector(tensor: gs.Tensor) -> bool:
    """Whether a tensor surely has one axis: a stored vector, cast or shifted by a number (Gemma's 1 + weight)."""
    if isinstance(tensor, gs.Constant):
        return len(tensor.shape) == 1
    node = match.producer(tensor)
    if node is None:
        return False
    if match.is_op(node, "Cast"):
        return _is_vector(node.inputs[0])
    if match.is_op(node, "Add"):
        first, second = node.inputs
        return (_is_vector(first) and match.scalar(second) is not None) or (
            _is_vector(second) and match.scalar(first) is not None)
    return False


def fuse_rotary(graph: gs.Graph, context: Context) -> Rewritten:
    """x * cos + rotate_half(x) * sin -> RotaryEmbedding(x, cos, sin), cos and sin [B, S, R/2] of each position."""
    halves: dict[int, gs.Tensor] = {}
    additions = [node for node in graph.nodes if match.is_op(node, "Add")]
    done = [_fuse_rotation(graph, node, halves) for node in additions]
    return Rewritten(done.count(True), tuple(each for each in done if isinstance(each, NearMiss)))


def _fuse_rotation(graph: gs.Graph, add: gs.Node, halves: dict[int, gs.Tensor]) -> bool | NearMiss:
    """Whether `add` was a rotation and is fused now; a near miss if it only looks like one."""
    reasons: list[str] = []
    for plain, turned in (add.inputs, add.inputs[::-1]):
        found = _match_rotation(plain, turned)
        if isinstance(found, str):
            reasons.append(found)
            continue
        x_BNSR, cos, sin, half = found
        tables = [_first_half(graph, table, half, halves) for table in (cos, sin)]
        scope, _, name = add.name.rpartition("/")
        fused = edit.add_node(graph, "RotaryEmbedding", [x_BNSR, *tables],
                              name=f"{scope}/RotaryEmbedding_{name.removeprefix('Add_')}", attrs={"interleaved": 0})[0]
        edit.replace_uses(graph, add.outputs[0], fused)
        edit.remove(add)
        return True
    muls = [mul for tensor in add.inputs if (mul := match.produced_by(tensor, "Mul")) is not None]
    if len(muls) == 2 and all(any(_is_table(tensor) for tensor in mul.inputs) for mul in muls):
        return NearMiss(add.name, max(reasons, key=len))
    return False


def _match_rotation(plain: gs.Tensor, turned: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor, int] | str:
    """x [B, N, S, R], cos and sin [B, S, R] and R/2, if `plain` is x * cos and `turned` rotate_half(x) * sin; or why
    they are not."""
    by_cos, by_sin = match.produced_by(plain, "Mul"), match.produced_by(turned, "Mul")
    if by_cos is None or by_sin is None:
        return "it does not add two products"
    reason = "neither product is of a Concat"
    for rotated, sin_B1SR in (by_sin.inputs, by_sin.inputs[::-1]):
        found = _rotated_half(rotated)
        if isinstance(found, str):
            reason = found or reason
            continue
        x, half = found
        if not any(tensor is x for tensor in by_cos.inputs):
            return f"cos is not multiplied by {x.name!r}, whose halves are turned"
        cos_B1SR = by_cos.inputs[1] if by_cos.inputs[0] is x else by_cos.inputs[0]
        cos, sin = _without_head_axis(cos_B1SR), _without_head_axis(sin_B1SR)
        if cos is not None and sin is not None and _halves_are_equal(cos) and _halves_are_equal(sin):
            return x, cos, sin, half
        reason = ("cos and sin are not tables [batch, tokens, size] with a head axis put in" if cos is None
                  or sin is None else "the two halves of cos or sin are not known to be equal")
    return reason


def _is_table(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a cos or sin, but for a few operations that shape or scale it."""
    node = match.producer(tensor)
    for _ in range(8):
        if node is None or match.is_op(node, "Cos") or match.is_op(node, "Sin"):
            return node is not None
        if node.domain or node.op not in ("Unsqueeze", "Cast", "Mul", "Div", "Concat", "Expand", "Reshape", "Slice"):
            return False
        node = match.producer(node.inputs[0])
    return False


def _rotated_half(tensor: gs.Tensor) -> tuple[gs.Tensor, int] | str:
    """x and R/2 if `tensor` is Concat(-x[..., R/2:], x[..., :R/2]); or why not, "" if it is not a Concat at all."""
    concat = match.produced_by(tensor, "Concat")
    if concat is None:
        return ""
    if concat.attrs.get("axis") not in (-1, 3) or len(concat.inputs) != 2:
        return f"{concat.name!r} does not join two halves along the last axis"
    negated = match.produced_by(concat.inputs[0], "Neg")
    second = _last_axis_slice(negated.inputs[0]) if negated is not None else None
    first = _last_axis_slice(concat.inputs[1])
    if first is None or second is None or first[0] is not second[0]:
        return f"{concat.name!r} does not join the negated second half of a tensor and its first half"
    half = first[2]
    if first[1] != 0 or second[1] != half or second[2] < 2 * half:
        return f"{concat.name!r} joins parts that are not the two halves"
    return first[0], half


def _last_axis_slice(tensor: gs.Tensor) -> tuple[gs.Tensor, int, int] | None:
    """x, start and end if `tensor` is x[..., start:end] with step 1 and constant numbers."""
    node = match.produced_by(tensor, "Slice")
    if node is None or len(node.inputs) < 4:
        return None
    start, end, axis = (match.scalar(value) for value in node.inputs[1:4])
    step = match.scalar(node.inputs[4]) if len(node.inputs) > 4 else 1
    if start is None or end is None or axis not in (-1, 3) or step != 1:
        return None
    return node.inputs[0], int(start), int(end)


def _without_head_axis(tensor: gs.Tensor) -> gs.Tensor | None:
    """The [B, S, R] that `tensor` [B, 1, S, R] was made from."""
    node = match.produced_by(tensor, "Unsqueeze")
    return node.inputs[0] if node is not None and match.is_scalar(node.inputs[1], 1) else None


def _halves_are_equal(table_BSR: gs.Tensor) -> bool:
    """Whether a cos or sin comes, element by element, from a Concat of one tensor with itself."""
    tensor = table_BSR
    while (node := match.producer(tensor)) is not None:
        if match.is_op(node, "Concat"):
            return (len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and node.attrs.get("axis") in (-1, 2))
        if match.is_op(node, "Mul") or match.is_op(node, "Div"):
            if match.scalar(node.inputs[1]) is None:
                return False
        elif not (match.is_op(node, "Cos") or match.is_op(node, "Sin") or match.is_op(node, "Cast")):
            return False
        tensor = node.inputs[0]
    return False


def _first_half(graph: gs.Graph, table_BSR: gs.Tensor, half: int, made: dict[int, gs.Tensor]) -> gs.Tensor:
    if id(table_BSR) not in made:
        name = f"{table_BSR.name}/half"
        bounds = [edit.constant(f"{name}/{label}", np.array([value], np.int64))
                  for label, value in (("start", 0), ("end", half), ("axis", -1))]
        made[id(table_BSR)] = edit.add_node(graph, "Slice", [table_BSR, *bounds], name=name)[0]
    return made[id(table_BSR)]
