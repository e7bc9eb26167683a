"""The body of `gqa::LongGroupedQueryAttention` version 1 in standard ONNX ops, as a model-local function.

The cache is made as in the body of `gqa::GroupedQueryAttention`, and a call of few tokens, or with a window, continues
as there. Another runs one Loop over the leaves of all sequences; what a leaf reads of the keys before it is in
`long_function_hyper` and `long_function_tiles`. A function cannot branch on text: a model has the body of the one
method that its calls have. Dimensions as in `gqa_export.long_attention_op`, and G = H / K, L positions of a leaf, X
keys of a leaf or G * S.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from .. import attention_op, long_attention_op
from ..errors import UnsupportedModel
from .attention_function import BEFORE, EXACT, IN_CHUNKS, PRESENT, in_chunks, opset_of
from .long_function_hyper import hyper
from .long_function_parts import Variant
from .long_function_tiles import tiles

REQUIRED = tuple(name for name in long_attention_op.INPUT_NAMES if name not in ("cos", "sin"))
"""inputs that a call of the function must give; cos and sin must be absent"""

_BODY = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{op} <{attributes}> ({inputs}) => ({outputs})
{{
""" + PRESENT + """
    leaf_ = Constant <value_int: int = @leaf> ()
    heavy_keys_ = Constant <value_int: int = @heavy_keys> ()
    samples_ = Constant <value_int: int = @samples> ()
    anchors_ = Constant <value_int: int = @anchors> ()
    tile_ = Constant <value_int: int = @tile> ()
    block_ = Constant <value_int: int = @block> ()
    score_rows_ = Constant <value_int: int = @score_rows> ()
    exact_steps_ = Constant <value_int: int = @exact_steps> ()

    many_steps = Greater (S_scalar, exact_steps_)
    no_wide_window = Equal (window_, zero)
    is_long = And (many_steps, no_wide_window)
    mean_any, selection = If (is_long) <
        then_branch = approximate () => (float[b, s, x] mean_long, int64[b, k, n] selection_long) {{
{approximate}
        }},
        else_branch = exact () => (float[b, s, x] mean_BSX, int64[b, k, n] selection_none) {{
            none = Constant <value_ints: ints = [0]> ()
            none_shape = Concat <axis: int = 0> (B, K, none)
            selection_none = ConstantOfShape <value: tensor = int64[1] {{0}}> (none_shape)
""" + EXACT + """
        }}
    >
    output = CastLike (mean_any, query)
}}
"""

_APPROXIMATE = """
            B_scalar = Squeeze (B, axis_0)
            minus_one = Constant <value_ints: ints = [-1]> ()
            axes_0_2 = Constant <value_ints: ints = [0, 2]> ()
            fraction_steps = Constant <value_int: int = 65536> ()
            lowest = Constant <value_float: float = -1e30> ()
            leaf_1 = Unsqueeze (leaf_, axis_0)
            total_B = Add (past_B, new_B)
            start_B = Max (past_B, zero)
            within_B = Min (total_B, T_scalar)
            end_B = Max (within_B, zero)
            final_B = Sub (end_B, one)
            final_token_B = Max (final_B, zero)
            last_leaf_B = Div (final_token_B, leaf_)
            begin_leaf_B = Div (start_B, leaf_)
            first_leaf_B = Min (begin_leaf_B, last_leaf_B)
            between_B = Sub (last_leaf_B, first_leaf_B)
            most_between = ReduceMax <keepdims: int = 0> (between_B)
            N = Add (most_between, one)
            trips = Mul (N, B_scalar)
            go = Constant <value: tensor = bool {{1}}> ()

            row_L = Range (zero, leaf_, one)
            row_L1 = Unsqueeze (row_L, axis_1)
            not_later_LL = LessOrEqual (row_L, row_L1)
            triangle_LL = Where (not_later_LL, zero_f, minus_inf)
            query_32 = Cast <to: int = 1> (query)
            rows_shape = Concat <axis: int = 0> (minus_one, K, G, D)
            plain_rows = Reshape (query_32, rows_shape)
            query_rows = Mul (plain_rows, scale_)
            key_32 = Cast <to: int = 1> (present_key)
            value_32 = Cast <to: int = 1> (present_value)
            sink_32 = Cast <to: int = 1> (sinks)
            has_softcap = Greater (softcap_, zero_f)
            softcap_or_1 = Where (has_softcap, softcap_, one_f)
            KGLE = Concat <axis: int = 0> (K, G, leaf_1, E)
            K_rows_D = Concat <axis: int = 0> (K, minus_one, D)
            last_step = Sub (S_scalar, one)
{before}
            leaf_parts, leaf_chosen = Loop (trips, go) <body = of_leaf (int64 i, bool on)
                    => (bool still_on, float[k, g, l, e] part, int64[k, c] chosen) {{
                still_on = Identity (on)
                b = Div (i, N)
                n = Mod (i, N)
                past = Gather (start_B, b)
                total = Gather (end_B, b)
                first_leaf = Gather (first_leaf_B, b)
                last_leaf = Gather (last_leaf_B, b)
                wanted_leaf = Add (first_leaf, n)
                t = Min (wanted_leaf, last_leaf)
                beyond = Greater (wanted_leaf, last_leaf)
                start = Mul (t, leaf_)
                shift = Sub (start, past)
                above = Neg (shift)
                low = Max (above, zero)
                rest = Sub (total, start)
                high = Min (rest, leaf_)
                difference = Sub (high, low)
                count = Max (difference, zero)
                step_L = Add (row_L, shift)
                step_from_0 = Max (step_L, zero)
                step_within = Min (step_from_0, last_step)
                before_b = Mul (b, S_scalar)
                row_index = Add (before_b, step_within)
                query_LKGD = Gather <axis: int = 0> (query_rows, row_index)
                query_KGLD = Transpose <perm: ints = [1, 2, 0, 3]> (query_LKGD)
                b_1 = Unsqueeze (b, axis_0)
                after_b = Add (b_1, single)
                start_1 = Unsqueeze (start, axis_0)
                whole_end = Add (start_1, leaf_1)
                end_1 = Min (whole_end, T)
                own_from = Concat <axis: int = 0> (b_1, start_1)
                own_to = Concat <axis: int = 0> (after_b, end_1)
                own_key_1 = Slice (key_32, own_from, own_to, axes_0_2)
                own_key = Squeeze (own_key_1, axis_0)
                own_value_1 = Slice (value_32, own_from, own_to, axes_0_2)
                own_value = Squeeze (own_value_1, axis_0)
                own_key_T = Transpose <perm: ints = [0, 2, 1]> (own_key)
                own_width = Sub (end_1, start_1)
                triangle_LX = Slice (triangle_LL, axis_0, own_width, axis_1)
{of_leaf}
            }}>

            parts_shape = Concat <axis: int = 0> (B, minus_one, K, G, leaf_1, E)
            parts = Reshape (leaf_parts, parts_shape)
            parts_in_order = Transpose <perm: ints = [0, 1, 4, 2, 3, 5]> (parts)
            flat_shape = Concat <axis: int = 0> (B, minus_one, HE)
            all_rows = Reshape (parts_in_order, flat_shape)
            first_row_B = Mul (first_leaf_B, leaf_)
            offset_B = Sub (start_B, first_row_B)
            offset_B1 = Unsqueeze (offset_B, axis_1)
            place_of_step_BS = Add (offset_B1, step_S)
            height = Mul (N, leaf_)
            final_row = Sub (height, one)
            row_place_BS = Min (place_of_step_BS, final_row)
            row_place_BS1 = Unsqueeze (row_place_BS, axis_2)
            found_BSX = GatherND <batch_dims: int = 1> (all_rows, row_place_BS1)
            is_row_BS = Less (step_S, new_B1)
            is_row_BS1 = Unsqueeze (is_row_BS, axis_2)
            clean_BSX = Where (is_row_BS1, found_BSX, zero_f)
            past_end_B1 = Greater (total_B1, T)
            below_zero_B1 = Less (past_B1, zero)
            too_many_B1 = Greater (new_B1, S)
            wrong_past_B1 = Or (past_end_B1, below_zero_B1)
            wrong_B1 = Or (wrong_past_B1, too_many_B1)
            wrong_BS = And (wrong_B1, is_row_BS)
            wrong_BS1 = Unsqueeze (wrong_BS, axis_2)
            mean_long = Where (wrong_BS1, nan, clean_BSX)
{after}
"""


def variant_of(calls: Sequence[Mapping[str, float]]) -> Variant:
    """Which body a model's calls need, by their attributes.

    Raises:
        UnsupportedModel: they have several methods, or some have anchors and some have none.
    """
    methods = {int(call["method"]) for call in calls}
    anchored = {call["anchors"] > 0 for call in calls}
    if len(methods) != 1 or len(anchored) != 1 or not methods <= set(long_attention_op.METHODS.values()):
        raise UnsupportedModel(f"the calls of {long_attention_op.OP} have methods {sorted(methods)}, anchors in "
                               f"{sorted(anchored)}: one function body serves one method, with or without anchors",
                               "model.functions", "give every call of a model one setting", code="E-GRAPH-LONG")
    return Variant(methods == {long_attention_op.METHODS["hyper"]}, anchored == {True},
                   any(call["softcap"] > 0 for call in calls))


def function_proto(opset: int, variant: Variant, chunks: bool = False) -> onnx.FunctionProto:
    """The function, at the opset of the model it goes into: onnx's checker refuses a mixture. chunks: see
    `attention_function.function_proto`."""
    method = (hyper if variant.hyper else tiles)(variant)
    approximate = _APPROXIMATE.replace("{{", "{").replace("}}", "}")
    for place, text in (("{before}", method.before), ("{of_leaf}", method.of_leaf), ("{after}", method.after)):
        approximate = approximate.replace(place, text)
    text = _BODY.format(domain=long_attention_op.DOMAIN, op=long_attention_op.OP, opset=opset,
                        before=IN_CHUNKS if chunks else BEFORE,
                        attributes=", ".join(long_attention_op.ATTRIBUTE_NAMES), approximate=approximate,
                        inputs=", ".join(long_attention_op.INPUT_NAMES),
                        outputs=", ".join(long_attention_op.OUTPUT_NAMES))
    function = onnx.parser.parse_function(text)
    function.doc_string = f"approximate attention for long prompts, contract version {long_attention_op.VERSION}"
    return function


def is_long_call(node: onnx.NodeProto) -> bool:
    """Whether a node is the op."""
    return node.op_type == long_attention_op.OP and node.domain == long_attention_op.DOMAIN


def attach_long_function(model: onnx.ModelProto) -> None:
    """Give the model the body of the op, in place, and a domain import; nothing where the model does not call it.

    Raises:
        UnsupportedModel: a call does not have the inputs or attributes that the body needs, or two need two bodies.
    """
    calls = [node for node in model.graph.node if is_long_call(node)]
    for node in calls:
        _check_call(node)
    if not calls:
        return
    attributes = [{attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
                  for node in calls]
    kept = [function for function in model.functions
            if (function.domain, function.name) != (long_attention_op.DOMAIN, long_attention_op.OP)]
    del model.functions[:]
    model.functions.extend([*kept, function_proto(opset_of(model), variant_of(attributes), any(map(in_chunks, calls)))])
    if not any(entry.domain == long_attention_op.DOMAIN for entry in model.opset_import):
        model.opset_import.add(domain=long_attention_op.DOMAIN, version=attention_op.VERSION)


def _check_call(node: onnx.NodeProto) -> None:
    inputs = dict(zip(long_attention_op.INPUT_NAMES, [*node.input, *[""] * len(long_attention_op.INPUT_NAMES)]))
    wrong = [f"{name} is absent" for name in REQUIRED if not inputs[name]]
    wrong += [f"{name} is given" for name in ("cos", "sin") if inputs[name]]
    names = {attribute.name for attribute in node.attribute}
    wrong += [f"attribute {name} is absent" for name in long_attention_op.ATTRIBUTE_NAMES if name not in names]
    if wrong:
        raise UnsupportedModel(f"the function body of {long_attention_op.OP} does not fit this call: "
                               f"{', '.join(wrong)}", f"node {node.name!r}", "use a target that has the op itself",
                               code="E-GRAPH-CALL")
