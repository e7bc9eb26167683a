"""The bodies of `gqa::LinearAttention` and `gqa::CausalConv` version 1 in standard ONNX ops.

Any ONNX runtime can run them. Linear attention is a Scan over the new tokens: the state goes in and out of each step
and nothing is approximated, whatever the decay; a convolution is one over the taps of its kernel. One body serves the
four rules: what a rule lacks is a neutral input (decay 0, beta 1), and `pull`, which takes back what the state already
holds, is 0 unless the rule is a delta rule. Padded positions are set to zero before they meet a state, so that it stays
as it is even if they are NaN. Arithmetic is in the type of the state: fp32, or fp64 where the state is. Dimensions as
in `gqa_export.state_ops`; J is K-1, L is K-1+S, G is 1 or Dk.

A lowering writes the bodies in place of the calls (`inline`), because a runtime may take a function of this name for
the standard operator: onnx.reference does.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from .. import state_ops
from ..errors import UnsupportedModel
from ..state_ops import CAUSAL_CONV, LINEAR_ATTENTION, RULES, STATE_OPS, StateOp
from .attention_function import opset_of

OPS = {op.name: op for op in STATE_OPS}

_CONSTANTS = """
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    axis_0 = Constant <value_ints: ints = [0]> ()
    axis_1 = Constant <value_ints: ints = [1]> ()
    axis_last = Constant <value_ints: ints = [-1]> ()
    zero_32 = Constant <value_float: float = 0.0> ()
    zero_f = CastLike (zero_32, state)
    new_B1 = Unsqueeze (new_lengths, axis_1)
"""

_LINEAR_ATTENTION = _CONSTANTS + """
    axis_2 = Constant <value_ints: ints = [2]> ()
    axis_3 = Constant <value_ints: ints = [3]> ()
    axes_2_3 = Constant <value_ints: ints = [2, 3]> ()
    first_delta = Constant <value_int: int = {first_delta}> ()
    rule_ = Constant <value_int: int = @rule> ()
    scale_ = Constant <value_float: float = @scale> ()
    scale_f = CastLike (scale_, state)
    is_delta = GreaterOrEqual (rule_, first_delta)
    delta_f = CastLike (is_delta, state)

    S = Shape <start: int = 1, end: int = 2> (value)
    Hq = Shape <start: int = 2, end: int = 3> (query)
    Hk = Shape <start: int = 2, end: int = 3> (key)
    Hv = Shape <start: int = 1, end: int = 2> (state)
    S_scalar = Squeeze (S, axis_0)
    Hv_scalar = Squeeze (Hv, axis_0)
    step_S = Range (zero, S_scalar, one)
    head_H = Range (zero, Hv_scalar, one)
    values_per_query = Div (Hv, Hq)
    values_per_key = Div (Hv, Hk)
    query_head_H = Div (head_H, values_per_query)
    key_head_H = Div (head_H, values_per_key)

    real_BS = Less (step_S, new_B1)
    real_BS1 = Unsqueeze (real_BS, axis_2)
    real_BS11 = Unsqueeze (real_BS, axes_2_3)

    query_f = CastLike (query, state)
    key_f = CastLike (key, state)
    value_f = CastLike (value, state)
    query_BSHD = Mul (query_f, scale_f)
    key_BSHD = Where (real_BS11, key_f, zero_f)
    value_BSHE = Where (real_BS11, value_f, zero_f)
    decay_BSHG = Where (real_BS11, decay, zero_f)
    beta_BSH = Where (real_BS1, beta, zero_f)
    factor_BSHG = Exp (decay_BSHG)
    beta_BSH1 = Unsqueeze (beta_BSH, axis_last)
    moved_BSHE = Mul (value_BSHE, beta_BSH1)
    pull_BSH1 = Mul (beta_BSH1, delta_f)

    query_SBHD = Transpose <perm: ints = [1, 0, 2, 3]> (query_BSHD)
    key_SBHD = Transpose <perm: ints = [1, 0, 2, 3]> (key_BSHD)
    moved_SBHE = Transpose <perm: ints = [1, 0, 2, 3]> (moved_BSHE)
    factor_SBHG = Transpose <perm: ints = [1, 0, 2, 3]> (factor_BSHG)
    pull_SBH1 = Transpose <perm: ints = [1, 0, 2, 3]> (pull_BSH1)
    moved_SBH1E = Unsqueeze (moved_SBHE, axis_3)
    factor_SBHG1 = Unsqueeze (factor_SBHG, axis_last)
    pull_SBH11 = Unsqueeze (pull_SBH1, axis_last)

    new_state, rows_SBH1E = Scan <num_scan_inputs: int = 5, body: graph = step
        (before_BHDE, q_BHD, k_BHD, moved_BH1E, factor_BHG1, pull_BH11) => (after_BHDE, row_BH1E) {{
        q_head = Gather <axis: int = 1> (q_BHD, query_head_H)
        k_head = Gather <axis: int = 1> (k_BHD, key_head_H)
        q_row = Unsqueeze (q_head, axis_2)
        k_row = Unsqueeze (k_head, axis_2)
        k_column = Unsqueeze (k_head, axis_3)
        kept_BHDE = Mul (before_BHDE, factor_BHG1)
        held_BH1E = MatMul (k_row, kept_BHDE)
        back_BH1E = Mul (held_BH1E, pull_BH11)
        target_BH1E = Sub (moved_BH1E, back_BH1E)
        added_BHDE = Mul (k_column, target_BH1E)
        after_BHDE = Add (kept_BHDE, added_BHDE)
        row_BH1E = MatMul (q_row, after_BHDE)
    }}> (state, query_SBHD, key_SBHD, moved_SBH1E, factor_SBHG1, pull_SBH11)
    rows_SBHE = Squeeze (rows_SBH1E, axis_3)
    rows_BSHE = Transpose <perm: ints = [1, 0, 2, 3]> (rows_SBHE)
    rows_real = Where (real_BS11, rows_BSHE, zero_f)
    output = CastLike (rows_real, query)
"""

_CAUSAL_CONV = _CONSTANTS + """
    axis_2 = Constant <value_ints: ints = [2]> ()
    axes_1_3 = Constant <value_ints: ints = [1, 3]> ()
    single = Constant <value_ints: ints = [1]> ()
    activation_ = Constant <value_int: int = @activation> ()
    is_silu = Equal (activation_, one)
    C = Shape <start: int = 1, end: int = 2> (x)
    S = Shape <start: int = 2, end: int = 3> (x)
    J = Shape <start: int = 2, end: int = 3> (state)
    S_scalar = Squeeze (S, axis_0)
    J_scalar = Squeeze (J, axis_0)
    K_scalar = Add (J_scalar, one)
    step_S = Range (zero, S_scalar, one)
    kept_J = Range (zero, J_scalar, one)
    tap_K = Range (zero, K_scalar, one)

    x_f = CastLike (x, state)
    weight_f = CastLike (weight, state)
    bias_f = CastLike (bias, state)
    inputs_BCL = Concat <axis: int = 2> (state, x_f)
    weight_KC = Transpose <perm: ints = [1, 0]> (weight_f)
    weight_KC1 = Unsqueeze (weight_KC, axis_last)
    shape_BCS = Shape (x)
    nothing_BCS = ConstantOfShape (shape_BCS)
    nothing_f = CastLike (nothing_BCS, state)
    sums_BCS = Scan <num_scan_inputs: int = 2, body: graph = tap (before_BCS, weight_C1, place) => (after_BCS) {
        start = Unsqueeze (place, axis_0)
        end = Add (start, S)
        met_BCS = Slice (inputs_BCL, start, end, axis_2)
        product_BCS = Mul (met_BCS, weight_C1)
        after_BCS = Add (before_BCS, product_BCS)
    }> (nothing_f, weight_KC1, tap_K)
    bias_C1 = Unsqueeze (bias_f, axis_1)
    biased_BCS = Add (sums_BCS, bias_C1)
    gate_BCS = Sigmoid (biased_BCS)
    silu_BCS = Mul (biased_BCS, gate_BCS)
    active_BCS = Where (is_silu, silu_BCS, biased_BCS)
    real_BS = Less (step_S, new_B1)
    real_B1S = Unsqueeze (real_BS, axis_1)
    rows_BCS = Where (real_B1S, active_BCS, zero_f)
    y = CastLike (rows_BCS, x)

    fewest = ReduceMin <keepdims: int = 0> (new_lengths)
    without_padding = GreaterOrEqual (fewest, S_scalar)
    L = Add (J, S)
    new_state = If (without_padding) <
        then_branch: graph = whole () => (end_BCJ) {
            end_BCJ = Slice (inputs_BCL, S, L, axis_2)
        },
        else_branch: graph = padded () => (last_BCJ) {
            last_BJ = Add (new_B1, kept_J)
            last_B1J1 = Unsqueeze (last_BJ, axes_1_3)
            C11 = Concat <axis: int = 0> (C, single, single)
            last_BCJ1 = Expand (last_B1J1, C11)
            last_BCJ = GatherND <batch_dims: int = 2> (inputs_BCL, last_BCJ1)
        }>
"""

_BODIES = {LINEAR_ATTENTION.name: _LINEAR_ATTENTION.format(first_delta=RULES.index("delta")),
           CAUSAL_CONV.name: _CAUSAL_CONV}


def function_proto(op: StateOp, opset: int) -> onnx.FunctionProto:
    """The body of an op as a function, at the opset of the model it goes into: onnx's checker refuses a mixture."""
    text = (f'<domain: "{state_ops.DOMAIN}", opset_import: ["" : {opset}]>\n{op.name} '
            f"<{', '.join(op.attribute_names)}> ({', '.join(op.input_names)}) => ({', '.join(op.output_names)})\n"
            f"{{{_BODIES[op.name]}}}")
    function = onnx.parser.parse_function(text)
    function.doc_string = f"{op.name}, contract version {state_ops.VERSION}"
    _name_nodes(function.node, "")
    return function


def _name_nodes(nodes: Iterable[onnx.NodeProto], scope: str) -> None:
    """Name each node by its first output and what is around it: the inliner makes unique what has a name."""
    for node in nodes:
        node.name = scope + node.output[0]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _name_nodes(attribute.g.node, f"{node.name}/")


def op_of(node: onnx.NodeProto) -> StateOp | None:
    """The state op that a node calls; None if it calls none."""
    return OPS.get(node.op_type) if node.domain == state_ops.DOMAIN else None


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model in which every call of a state op is replaced by its body; the model itself if it has none.

    Weights are not touched, and other functions stay.

    Raises:
        UnsupportedModel: a call does not have the inputs or attributes of the contract.
    """
    from onnx import inliner

    called = {op.name: op for node in model.graph.node if (op := op_of(node)) is not None}
    if not called:
        return model
    for node in model.graph.node:
        check_call(node)
    attached = onnx.ModelProto()
    attached.CopyFrom(model)
    attached.functions.extend(function_proto(op, opset_of(model)) for op in called.values())
    flat = inliner.inline_selected_functions(attached, [(state_ops.DOMAIN, name) for name in called])
    domains = {node.domain for node in [*flat.graph.node, *(node for each in flat.functions for node in each.node)]}
    imports = [entry for entry in flat.opset_import
               if entry.domain != state_ops.DOMAIN or entry.domain in domains]
    del flat.opset_import[:]
    flat.opset_import.extend(imports)
    return flat


def check_call(node: onnx.NodeProto) -> None:
    """Refuse a call of a state op that the contract does not describe; other nodes pass.

    Raises:
        UnsupportedModel: an input or attribute is absent, or an attribute unknown.
    """
    op = op_of(node)
    if op is None:
        return
    given = dict(zip(op.input_names, [*node.input, *[""] * len(op.inputs)]))
    names = {attribute.name for attribute in node.attribute}
    wrong = [f"{name} is absent" for name in op.input_names if not given[name]]
    wrong += [f"attribute {name} is absent" for name in op.attribute_names if name not in names]
    wrong += [f"attribute {name} is unknown" for name in sorted(names.difference(op.attribute_names))]
    if wrong:
        raise UnsupportedModel(f"the function body of {op.name} does not fit this call: {', '.join(wrong)}",
                               f"node {node.name!r}", "this is a fault of gqa-export: please report the model it was "
                               "exported from", code="E-GRAPH-CALL")
