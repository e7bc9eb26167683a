"""Decomposed norms and rotations -> ai.onnx RMSNormalization and RotaryEmbedding, opset 23.

Both are matched as `transformers` writes them; what does not match stays as it is, which is right too.
Dimensions: B, S, N heads of a query or key, D head size, R rotary size.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...graph import edit, match
from ..context import Context

FLOAT = onnx.TensorProto.FLOAT


def fuse_rms_norm(graph: gs.Graph, context: Context) -> int:
    """x * rsqrt(mean(x^2) + epsilon) * weight -> RMSNormalization(x, weight)."""
    multiplications = [node for node in graph.nodes if match.is_op(node, "Mul")]
    return sum(_fuse_norm(graph, node) for node in multiplications if node.inputs)


def _fuse_norm(graph: gs.Graph, normalise: gs.Node) -> bool:
    for x, factor in (normalise.inputs, normalise.inputs[::-1]):
        epsilon = _reciprocal_root_mean_square(factor, x)
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
            return False
        weight = after.inputs[1] if after.inputs[0] is normalised else after.inputs[0]
        if not _is_vector(weight):
            return False
        scope = after.name.rpartition("/")[0]
        fused = edit.add_node(graph, "RMSNormalization", [x_stored, weight], name=f"{scope}/RMSNormalization",
                              attrs={"axis": -1, "epsilon": epsilon, "stash_type": FLOAT})[0]
        edit.replace_uses(graph, after.outputs[0], fused)
        edit.remove(after)
        return True
    return False


def _reciprocal_root_mean_square(factor: gs.Tensor, x: gs.Tensor) -> float | None:
    """epsilon if `factor` is 1 / sqrt(mean(x * x, last axis) + epsilon), else None."""
    tensor = factor
    for op in ("Reciprocal", "Sqrt"):
        node = match.produced_by(tensor, op)
        if node is None:
            return None
        tensor = node.inputs[0]
    add = match.produced_by(tensor, "Add")
    if add is None:
        return None
    for mean, constant in (add.inputs, add.inputs[::-1]):
        epsilon, reduce = match.scalar(constant), match.produced_by(mean, "ReduceMean")
        if epsilon is None or reduce is None or not reduce.attrs.get("keepdims", 1) or len(reduce.inputs) < 2:
            continue
        axes, square = match.const_value(reduce.inputs[1]), match.produced_by(reduce.inputs[0], "Pow")
        if (axes is not None and axes.tolist() == [-1] and square is not None and square.inputs[0] is x
                and match.is_scalar(square.inputs[1], 2)):
            return float(epsilon)
    return None


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


def fuse_rotary(graph: gs.Graph, context: Context) -> int:
    """x * cos + rotate_half(x) * sin -> RotaryEmbedding(x, cos, sin), cos and sin [B, S, R/2] of each position."""
    halves: dict[int, gs.Tensor] = {}
    additions = [node for node in graph.nodes if match.is_op(node, "Add")]
    return sum(_fuse_rotation(graph, node, halves) for node in additions)


def _fuse_rotation(graph: gs.Graph, add: gs.Node, halves: dict[int, gs.Tensor]) -> bool:
    for plain, turned in (add.inputs, add.inputs[::-1]):
        found = _match_rotation(plain, turned)
        if found is None:
            continue
        x_BNSR, cos, sin, half = found
        tables = [_first_half(graph, table, half, halves) for table in (cos, sin)]
        scope, _, name = add.name.rpartition("/")
        fused = edit.add_node(graph, "RotaryEmbedding", [x_BNSR, *tables],
                              name=f"{scope}/RotaryEmbedding_{name.removeprefix('Add_')}", attrs={"interleaved": 0})[0]
        edit.replace_uses(graph, add.outputs[0], fused)
        edit.remove(add)
        return True
    return False


def _match_rotation(plain: gs.Tensor, turned: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor, int] | None:
    """x [B, N, S, R], cos and sin [B, S, R] and R/2, if `plain` is x * cos and `turned` rotate_half(x) * sin."""
    by_cos, by_sin = match.produced_by(plain, "Mul"), match.produced_by(turned, "Mul")
    if by_cos is None or by_sin is None:
        return None
    for rotated, sin_B1SR in (by_sin.inputs, by_sin.inputs[::-1]):
        found = _rotated_half(rotated)
        if found is None:
            continue
        x, half = found
        if not any(tensor is x for tensor in by_cos.inputs):
            return None
        cos_B1SR = by_cos.inputs[1] if by_cos.inputs[0] is x else by_cos.inputs[0]
        cos, sin = _without_head_axis(cos_B1SR), _without_head_axis(sin_B1SR)
        if cos is not None and sin is not None and _halves_are_equal(cos) and _halves_are_equal(sin):
            return x, cos, sin, half
    return None


def _rotated_half(tensor: gs.Tensor) -> tuple[gs.Tensor, int] | None:
    """x and R/2 if `tensor` is Concat(-x[..., R/2:], x[..., :R/2])."""
    concat = match.produced_by(tensor, "Concat")
    if concat is None or concat.attrs.get("axis") not in (-1, 3) or len(concat.inputs) != 2:
        return None
    negated = match.produced_by(concat.inputs[0], "Neg")
    second = _last_axis_slice(negated.inputs[0]) if negated is not None else None
    first = _last_axis_slice(concat.inputs[1])
    if first is None or second is None or first[0] is not second[0]:
        return None
    half = first[2]
    if first[1] != 0 or second[1] != half or second[2] < 2 * half:
        return None
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
