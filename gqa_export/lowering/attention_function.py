"""The body of `gqa::GroupedQueryAttention` version 1 in standard ONNX ops, as a model-local function.

Any ONNX runtime can run it. One body, without branches, serves both cache modes: it gathers the present cache out
of [past | new | one row of zeros] by index, so token t of sequence b lands at t, and whatever is not a valid token
becomes zero, be it NaN before. A third mode, a ring, is in `ring_function`. Queries of a group share their key/value
head by a reshape, nothing is repeated.
Arithmetic is fp32 whatever the model's type. Dimensions as in `gqa_export.attention_op`, and G = H / K.

A model with attention in chunks has a few nodes more in the body, for the first key of a chunk; no other model has.

A function cannot see which inputs a call has. This one needs key, value and sinks, and does not rotate: the canonical
graph gives sinks of -inf for "none" and rotates outside. `attach_function` refuses any other call.
"""

from __future__ import annotations

import onnx

from .. import attention_op
from ..errors import UnsupportedModel
from .ring_function import with_ring

REQUIRED = tuple(name for name in attention_op.INPUT_NAMES if name not in ("cos", "sin"))
"""inputs that a call of the function must give; cos and sin must be absent"""

PRESENT = """    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    axis_0 = Constant <value_ints: ints = [0]> ()
    axis_1 = Constant <value_ints: ints = [1]> ()
    axis_2 = Constant <value_ints: ints = [2]> ()
    axis_last = Constant <value_ints: ints = [-1]> ()
    single = Constant <value_ints: ints = [1]> ()
    axes_1_2 = Constant <value_ints: ints = [1, 2]> ()
    axes_1_3 = Constant <value_ints: ints = [1, 3]> ()
    far = Constant <value_int: int = 4611686018427387904> ()
    zero_f = Constant <value_float: float = 0.0> ()
    one_f = Constant <value_float: float = 1.0> ()
    minus_inf = Constant <value_float: float = -inf> ()
    nan = Constant <value_float: float = nan> ()

    num_heads_ = Constant <value_int: int = @num_heads> ()
    kv_num_heads_ = Constant <value_int: int = @kv_num_heads> ()
    scale_ = Constant <value_float: float = @scale> ()
    softcap_ = Constant <value_float: float = @softcap> ()
    window_ = Constant <value_int: int = @window> ()
    growing_ = Constant <value_int: int = @growing> ()

    B = Shape <start: int = 0, end: int = 1> (query)
    S = Shape <start: int = 1, end: int = 2> (query)
    P = Shape <start: int = 2, end: int = 3> (past_key)
    D = Shape <start: int = 3, end: int = 4> (past_key)
    E = Shape <start: int = 3, end: int = 4> (past_value)
    H = Unsqueeze (num_heads_, axis_0)
    K = Unsqueeze (kv_num_heads_, axis_0)
    G = Div (H, K)
    GS = Mul (G, S)
    HE = Mul (H, E)
    PS = Add (P, S)
    grown = Mul (S, growing_)
    T = Add (P, grown)

    past_B = Cast <to: int = 7> (past_lengths)
    new_B = Cast <to: int = 7> (new_lengths)
    past_B1 = Unsqueeze (past_B, axis_1)
    new_B1 = Unsqueeze (new_B, axis_1)
    total_B1 = Add (past_B1, new_B1)
    T_scalar = Squeeze (T, axis_0)
    S_scalar = Squeeze (S, axis_0)
    cache_T = Range (zero, T_scalar, one)
    step_S = Range (zero, S_scalar, one)

    from_past_BT = Less (cache_T, past_B1)
    shift_B1 = Sub (P, past_B1)
    new_place_BT = Add (cache_T, shift_B1)
    place_BT = Where (from_past_BT, cache_T, new_place_BT)
    valid_BT = Less (cache_T, total_B1)
    wanted_BT = Where (valid_BT, place_BT, PS)
    index_BT = Min (wanted_BT, PS)
    index_B1T1 = Unsqueeze (index_BT, axes_1_3)
    index_shape = Concat <axis: int = 0> (B, K, T, single)
    index_BKT1 = Expand (index_B1T1, index_shape)

    key_shape = Concat <axis: int = 0> (B, S, K, D)
    key_BSKD = Reshape (key, key_shape)
    key_BKSD = Transpose <perm: ints = [0, 2, 1, 3]> (key_BSKD)
    zero_key_shape = Concat <axis: int = 0> (B, K, single, D)
    zero_key_f = ConstantOfShape (zero_key_shape)
    zero_key = CastLike (zero_key_f, past_key)
    keys = Concat <axis: int = 2> (past_key, key_BKSD, zero_key)
    present_key = GatherND <batch_dims: int = 2> (keys, index_BKT1)

    value_shape = Concat <axis: int = 0> (B, S, K, E)
    value_BSKE = Reshape (value, value_shape)
    value_BKSE = Transpose <perm: ints = [0, 2, 1, 3]> (value_BSKE)
    zero_value_shape = Concat <axis: int = 0> (B, K, single, E)
    zero_value_f = ConstantOfShape (zero_value_shape)
    zero_value = CastLike (zero_value_f, past_value)
    values = Concat <axis: int = 2> (past_value, value_BKSE, zero_value)
    present_value = GatherND <batch_dims: int = 2> (values, index_BKT1)

"""
"""constants, attributes, sizes, and the present cache"""

EXACT = """    step_B1S = Add (past_B1, step_S)
    position_BS1 = Unsqueeze (step_B1S, axis_2)
    causal_BST = LessOrEqual (cache_T, position_BS1)
    no_window = Equal (window_, zero)
    reach = Where (no_window, far, window_)
{before}    near_BST = Greater (cache_T, before_BS1)
    row_BS = Less (step_S, new_B1)
    row_BS1 = Unsqueeze (row_BS, axis_2)
    seen_BST = And (causal_BST, near_BST)
    visible_BST = And (seen_BST, row_BS1)
    visible_B11ST = Unsqueeze (visible_BST, axes_1_2)

    query_f = Cast <to: int = 1> (query)
    query_scaled = Mul (query_f, scale_)
    query_shape = Concat <axis: int = 0> (B, S, K, G, D)
    query_BSKGD = Reshape (query_scaled, query_shape)
    query_BKGSD = Transpose <perm: ints = [0, 2, 3, 1, 4]> (query_BSKGD)
    group_shape = Concat <axis: int = 0> (B, K, GS, D)
    query_BKXD = Reshape (query_BKGSD, group_shape)
    key_f = Cast <to: int = 1> (present_key)
    key_BKDT = Transpose <perm: ints = [0, 1, 3, 2]> (key_f)
    dots_BKXT = MatMul (query_BKXD, key_BKDT)
    scores_shape = Concat <axis: int = 0> (B, K, G, S, T)
    dots_BKGST = Reshape (dots_BKXT, scores_shape)
    has_cap = Greater (softcap_, zero_f)
    cap = Where (has_cap, softcap_, one_f)
    over_cap = Div (dots_BKGST, cap)
    bent = Tanh (over_cap)
    capped = Mul (bent, cap)
    scores_BKGST = Where (has_cap, capped, dots_BKGST)
    masked_BKGST = Where (visible_B11ST, scores_BKGST, minus_inf)

    sink_shape = Concat <axis: int = 0> (single, K, G, single, single)
    sink_f = Cast <to: int = 1> (sinks)
    sink_1KG11 = Reshape (sink_f, sink_shape)
    best = ReduceMax <keepdims: int = 1> (masked_BKGST, axis_last)
    top = Max (best, sink_1KG11)
    unseen = Equal (top, minus_inf)
    base = Where (unseen, zero_f, top)
    lowered = Sub (masked_BKGST, base)
    weights_BKGST = Exp (lowered)
    mass = ReduceSum <keepdims: int = 1> (weights_BKGST, axis_last)
    sink_lowered = Sub (sink_1KG11, base)
    sink_mass = Exp (sink_lowered)
    whole = Add (mass, sink_mass)
    nothing = Equal (whole, zero_f)
    divisor = Where (nothing, one_f, whole)

    over_capacity_B1 = Greater (total_B1, T)
    negative_B1 = Less (past_B1, zero)
    over_steps_B1 = Greater (new_B1, S)
    broken_past_B1 = Or (over_capacity_B1, negative_B1)
    broken_B1 = Or (broken_past_B1, over_steps_B1)
    broken_BS = And (broken_B1, row_BS)
    broken_B1S = Unsqueeze (broken_BS, axes_1_2)
    broken_B11S1 = Unsqueeze (broken_B1S, axis_last)
    loud = Where (broken_B11S1, nan, divisor)

    weights_shape = Concat <axis: int = 0> (B, K, GS, T)
    weights_BKXT = Reshape (weights_BKGST, weights_shape)
    value_f = Cast <to: int = 1> (present_value)
    sum_BKXE = MatMul (weights_BKXT, value_f)
    sum_shape = Concat <axis: int = 0> (B, K, G, S, E)
    sum_BKGSE = Reshape (sum_BKXE, sum_shape)
    mean_BKGSE = Div (sum_BKGSE, loud)
    mean_BSKGE = Transpose <perm: ints = [0, 3, 1, 2, 4]> (mean_BKGSE)
    output_shape = Concat <axis: int = 0> (B, S, HE)
    mean_BSX = Reshape (mean_BSKGE, output_shape)
"""
"""attention of every new token over every key that it sees, to mean_BSX in fp32; {before}: `BEFORE` or `IN_CHUNKS`"""

BEFORE = """    before_BS1 = Sub (position_BS1, reach)
"""
IN_CHUNKS = """    behind_BS1 = Sub (position_BS1, reach)
    in_chunks = Less (window_, zero)
    negated = Neg (window_)
    size = Where (in_chunks, negated, one)
    chunk_BS1 = Div (position_BS1, size)
    first_BS1 = Mul (chunk_BS1, size)
    outside_BS1 = Sub (first_BS1, one)
    before_BS1 = Where (in_chunks, outside_BS1, behind_BS1)
"""
"""the last position that a token does not see, without and with chunks"""

_BODY = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{op} <{attributes}> ({inputs}) => ({outputs})
{{
""" + PRESENT + EXACT + """    output = CastLike (mean_BSX, query)
}}
"""


def function_proto(opset: int, chunks: bool = False, ring: bool = False) -> onnx.FunctionProto:
    """The function, at the opset of the model it goes into: onnx's checker refuses a mixture. chunks: with what a call
    of attention in chunks needs. ring: a call's cache is a ring."""
    text = (with_ring(_BODY) if ring else _BODY).format(domain=attention_op.DOMAIN, op=attention_op.OP, opset=opset,
                        before=IN_CHUNKS if chunks else BEFORE,
                        attributes=", ".join(attention_op.ATTRIBUTE_NAMES), inputs=", ".join(attention_op.INPUT_NAMES),
                        outputs=", ".join(attention_op.OUTPUT_NAMES))
    function = onnx.parser.parse_function(text)
    function.doc_string = f"grouped-query attention over a key/value cache, contract version {attention_op.VERSION}"
    return function


def is_call(node: onnx.NodeProto) -> bool:
    """Whether a node is the op."""
    return node.op_type == attention_op.OP and node.domain == attention_op.DOMAIN


def in_chunks(call: onnx.NodeProto) -> bool:
    """Whether a call is attention in chunks."""
    return any(attribute.name == "window" and attribute.i < 0 for attribute in call.attribute)


def is_ring(call: onnx.NodeProto) -> bool:
    """Whether the cache of a call is a ring."""
    return any(attribute.name == "growing" and attribute.i == attention_op.RING for attribute in call.attribute)


def attach_function(model: onnx.ModelProto) -> None:
    """Give the model the body of the op, in place, and a domain import; a body already there is replaced.

    Args:
        model: with calls of the op in its main graph; changed in place.

    Raises:
        UnsupportedModel: a call does not have the inputs or attributes that the body needs.
    """
    calls = [node for node in model.graph.node if is_call(node)]
    for node in calls:
        _check_call(node)
    kept = [function for function in model.functions if (function.domain, function.name) != (attention_op.DOMAIN,
                                                                                            attention_op.OP)]
    del model.functions[:]
    model.functions.extend(kept)
    model.functions.append(function_proto(opset_of(model), any(map(in_chunks, calls)), any(map(is_ring, calls))))
    if not any(entry.domain == attention_op.DOMAIN for entry in model.opset_import):
        model.opset_import.add(domain=attention_op.DOMAIN, version=attention_op.VERSION)


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model in which every call is replaced by the body and no function of ours is left.

    Weights are not touched. Other functions of the model stay.

    Raises:
        UnsupportedModel: as `attach_function`.
    """
    from onnx import inliner

    attached = onnx.ModelProto()
    attached.CopyFrom(model)
    attach_function(attached)
    flat = inliner.inline_selected_functions(attached, [(attention_op.DOMAIN, attention_op.OP)])
    imports = [entry for entry in flat.opset_import if entry.domain != attention_op.DOMAIN]
    if not any(is_call(node) for node in flat.graph.node):
        del flat.opset_import[:]
        flat.opset_import.extend(imports)
    return flat


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard ops that a model imports."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _check_call(node: onnx.NodeProto) -> None:
    inputs = dict(zip(attention_op.INPUT_NAMES, [*node.input, *[""] * len(attention_op.INPUT_NAMES)]))
    wrong = [f"{name} is absent" for name in REQUIRED if not inputs[name]]
    wrong += [f"{name} is given" for name in ("cos", "sin") if inputs[name]]
    names = {attribute.name for attribute in node.attribute}
    wrong += [f"attribute {name} is absent" for name in attention_op.ATTRIBUTE_NAMES if name not in names]
    wrong += [f"attribute {name} is unknown" for name in sorted(names.difference(attention_op.ATTRIBUTE_NAMES))]
    if wrong:
        raise UnsupportedModel(f"the function body of {attention_op.OP} does not fit this call: {', '.join(wrong)}",
                               f"node {node.name!r}", "use a target that has the op itself, or rotate outside the op",
                               code="E-GRAPH-CALL")
