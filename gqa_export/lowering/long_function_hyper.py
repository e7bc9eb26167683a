"""Method hyper of the body of `gqa::LongGroupedQueryAttention`, as ONNX text.

A Loop over the segments merges a running softmax, rows in the order of their slots: slot s of L holds the row of rank
ceil(s * rows / L), so that the rows of a bucket lie side by side however few there are. Names from around are those of
`long_function`.
"""

from __future__ import annotations

from .long_function_parts import SAMPLES, Method, Variant, capped


def hyper(variant: Variant) -> Method:
    """Buckets of sorted codes, segment by segment."""
    before = """
    r = Shape <start: int = 1, end: int = 2> (projections)
    r_0 = Squeeze (r, axis_0)
    bit = Range (zero, r_0, one)
    bit_f = Cast <to: int = 1> (bit)
    two_f = Constant <value_float: float = 2.0> ()
    power_f = Pow (two_f, bit_f)
    power = Cast <to: int = 7> (power_f)
    far_place_f = Pow (two_f, r_0)
    far_place = Cast <to: int = 7> (far_place_f)
    key_hash = MatMul (key_32, projections)
    key_sign = Greater (key_hash, zero_f)
    key_bits = Cast <to: int = 7> (key_sign)
    key_powers = Mul (key_bits, power)
    key_code = ReduceSum <keepdims: int = 0> (key_powers, axis_last)
    key_place = Gather (code_order, key_code)
    row_hash = MatMul (plain_rows, projections)
    row_sign = Greater (row_hash, zero_f)
    row_bits = Cast <to: int = 7> (row_sign)
    row_powers = Mul (row_bits, power)
    row_code = ReduceSum <keepdims: int = 0> (row_powers, axis_last)
    row_place_found = Gather (code_order, row_code)
    is_new_BS = Less (step_S, new_B1)
    is_new_rows_shape = Concat <axis: int = 0> (minus_one, single, single)
    is_new_rows = Reshape (is_new_BS, is_new_rows_shape)
    row_place = Where (is_new_rows, row_place_found, zero)
    sink_shape_KG = Concat <axis: int = 0> (K, G, single, single)
    sink_KG11 = Reshape (sink_32, sink_shape_KG)
    KGL = Concat <axis: int = 0> (K, G, leaf_1)
    GL = Mul (G, leaf_1)
    K_GL_any = Concat <axis: int = 0> (K, GL, minus_one)
    KGL_any = Concat <axis: int = 0> (K, G, leaf_1, minus_one)
    anchors_1 = Unsqueeze (anchors_, axis_0)
    no_choice_shape = Concat <axis: int = 0> (K, axis_0)
    segments_most = Constant <value_int: int = 63> ()
"""
    own = f"""
    chosen = ConstantOfShape <value: tensor = int64[1] {{0}}> (no_choice_shape)
    place_LKG = Gather <axis: int = 0> (row_place, row_index)
    place_KGL = Transpose <perm: ints = [1, 2, 0]> (place_LKG)
    from_low_L = GreaterOrEqual (row_L, low)
    to_high_L = Less (row_L, high)
    is_mine_L = And (from_low_L, to_high_L)
    ranked_place = Where (is_mine_L, place_KGL, far_place)
    sort_high = Mul (ranked_place, leaf_)
    sort_key = Add (sort_high, row_L)
    sorted_key, order = TopK <axis: int = -1, largest: int = 0, sorted: int = 1> (sort_key, leaf_1)
    some_rows = Max (count, one)
    last_rank = Sub (some_rows, one)
    slot_rows = Mul (row_L, some_rows)
    slot_up = Add (slot_rows, leaf_)
    slot_up_1 = Sub (slot_up, one)
    slot_rank = Div (slot_up_1, leaf_)
    rank_at_slot = Min (slot_rank, last_rank)
    row_at_slot = Gather <axis: int = 2> (order, rank_at_slot)
    row_at_slot_1 = Unsqueeze (row_at_slot, axis_last)
    row_every = Expand (row_L, KGL)
    zero_ranks = ConstantOfShape <value: tensor = int64[1] {{0}}> (KGL)
    rank = ScatterElements <axis: int = 2> (zero_ranks, order, row_every)
    rank_leaf = Mul (rank, leaf_)
    slot_any = Div (rank_leaf, some_rows)
    last_slot = Sub (leaf_, one)
    slot = Min (slot_any, last_slot)
    slot_1 = Unsqueeze (slot, axis_last)
    query_slot = GatherND <batch_dims: int = 2> (query_KGLD, row_at_slot_1)
    query_KXD = Reshape (query_slot, K_rows_D)
    own_dots = MatMul (query_KXD, own_key_T)
    own_KGLX = Reshape (own_dots, KGL_any)
    {capped("own_scores", "own_KGLX", variant)}
    triangle_slot = Gather <axis: int = 0> (triangle_LX, row_at_slot)
    own_visible = Add (own_scores, triangle_slot)
    own_top = ReduceMax <keepdims: int = 1> (own_visible, axis_last)
    own_lowered = Sub (own_visible, own_top)
    own_weights = Exp (own_lowered)
    own_total = ReduceSum <keepdims: int = 1> (own_weights, axis_last)
    own_weights_K = Reshape (own_weights, K_GL_any)
    own_sum_K = MatMul (own_weights_K, own_value)
    own_sum = Reshape (own_sum_K, KGLE)
    has_prefix = Greater (t, zero)
"""
    anchor_mask = """
    key_is_anchor = Less (KEY_INDEX, anchors_)
    NAME = And (key_is_anchor, is_first)
"""
    segment = f"""
    minus_rest = Neg (rest_leaves)
    lowest_bit = BitwiseAnd (rest_leaves, minus_rest)
    rest_after = Sub (rest_leaves, lowest_bit)
    more_after = Greater (rest_after, zero)
    width = Mul (lowest_bit, leaf_)
    width_1 = Unsqueeze (width, axis_0)
    segment_start = Mul (rest_after, leaf_)
    segment_start_1 = Unsqueeze (segment_start, axis_0)
    segment_end_1 = Add (segment_start_1, width_1)
    is_first = Equal (segment_start, zero)
    segment_from = Concat <axis: int = 0> (b_1, segment_start_1)
    segment_to = Concat <axis: int = 0> (after_b, segment_end_1)
    segment_key_1 = Slice (key_32, segment_from, segment_to, axes_0_2)
    segment_key = Squeeze (segment_key_1, axis_0)
    segment_value_1 = Slice (value_32, segment_from, segment_to, axes_0_2)
    segment_value = Squeeze (segment_value_1, axis_0)
    segment_place_1 = Slice (key_place, segment_from, segment_to, axes_0_2)
    segment_place = Squeeze (segment_place_1, axis_0)
    bucket_any = Div (width, heavy_keys_)
    bucket_count = Max (bucket_any, one)
    bucket_count_1 = Unsqueeze (bucket_count, axis_0)
    bucket_keys_1 = Div (width_1, bucket_count_1)
    bucket_rows = Div (leaf_, bucket_count)
    bucket_rows_1 = Unsqueeze (bucket_rows, axis_0)
    key_number = Range (zero, width, one)
    key_sort_high = Mul (segment_place, width)
    key_sort = Add (key_sort_high, key_number)
    key_sorted, key_order = TopK <axis: int = -1, largest: int = 0, sorted: int = 1> (key_sort, width_1)
    key_order_1 = Unsqueeze (key_order, axis_last)
    sorted_key_KXD = GatherND <batch_dims: int = 1> (segment_key, key_order_1)
    sorted_value_KXE = GatherND <batch_dims: int = 1> (segment_value, key_order_1)
    bucket_key_shape = Concat <axis: int = 0> (K, bucket_count_1, bucket_keys_1, D)
    bucket_value_shape = Concat <axis: int = 0> (K, bucket_count_1, bucket_keys_1, E)
    bucket_key = Reshape (sorted_key_KXD, bucket_key_shape)
    bucket_value = Reshape (sorted_value_KXE, bucket_value_shape)
    split_rows_shape = Concat <axis: int = 0> (K, G, bucket_count_1, bucket_rows_1, D)
    split_rows = Reshape (query_slot, split_rows_shape)
    rows_by_bucket = Transpose <perm: ints = [0, 2, 1, 3, 4]> (split_rows)
    group_rows = Mul (G, bucket_rows_1)
    bucket_query_shape = Concat <axis: int = 0> (K, bucket_count_1, group_rows, D)
    bucket_query = Reshape (rows_by_bucket, bucket_query_shape)
    bucket_key_T = Transpose <perm: ints = [0, 1, 3, 2]> (bucket_key)
    heavy_dots = MatMul (bucket_query, bucket_key_T)
    {capped("heavy_scores", "heavy_dots", variant)}
    HEAVY_MASK
    heavy_top_found = ReduceMax <keepdims: int = 1> (heavy_counted, axis_last)
    heavy_top_X = Max (heavy_top_found, lowest)
    heavy_lowered = Sub (heavy_counted, heavy_top_X)
    heavy_weights = Exp (heavy_lowered)
    heavy_total_X = ReduceSum <keepdims: int = 1> (heavy_weights, axis_last)
    heavy_sum_X = MatMul (heavy_weights, bucket_value)
    bucket_parts = Concat <axis: int = 0> (K, bucket_count_1, G, bucket_rows_1, minus_one)
    KGL1 = Concat <axis: int = 0> (K, G, leaf_1, single)
    heavy_sum_5 = Reshape (heavy_sum_X, bucket_parts)
    heavy_sum_T = Transpose <perm: ints = [0, 2, 1, 3, 4]> (heavy_sum_5)
    heavy_sum = Reshape (heavy_sum_T, KGLE)
    heavy_top_5 = Reshape (heavy_top_X, bucket_parts)
    heavy_top_T = Transpose <perm: ints = [0, 2, 1, 3, 4]> (heavy_top_5)
    heavy_top = Reshape (heavy_top_T, KGL1)
    heavy_total_5 = Reshape (heavy_total_X, bucket_parts)
    heavy_total_T = Transpose <perm: ints = [0, 2, 1, 3, 4]> (heavy_total_5)
    heavy_total = Reshape (heavy_total_T, KGL1)
{SAMPLES.replace("KEYS", "segment_key").replace("VALUES", "segment_value")}
    sample_dots = MatMul (query_KXD, sample_key_T)
    sample_KGLX = Reshape (sample_dots, KGL_any)
    {capped("sample_scores", "sample_KGLX", variant)}
    place_shape = Shape (segment_place)
    zero_key_ranks = ConstantOfShape <value: tensor = int64[1] {{0}}> (place_shape)
    key_number_every = Expand (key_number, place_shape)
    key_rank = ScatterElements <axis: int = 1> (zero_key_ranks, key_order, key_number_every)
    sample_rank = GatherElements <axis: int = 1> (key_rank, sample)
    sample_bucket = Div (sample_rank, bucket_keys_1)
    slot_bucket = Div (row_L, bucket_rows)
    slot_bucket_L1 = Unsqueeze (slot_bucket, axis_1)
    sample_bucket_4 = Unsqueeze (sample_bucket, axes_1_2)
    same_bucket = Equal (sample_bucket_4, slot_bucket_L1)
    SAMPLE_MASK
    sample_bias = Where (is_left_out, minus_inf, log_weight)
    sample_counted = Add (sample_scores, sample_bias)
    sample_top_found = ReduceMax <keepdims: int = 1> (sample_counted, axis_last)
    sample_top = Max (sample_top_found, lowest)
    sample_lowered = Sub (sample_counted, sample_top)
    sample_weights = Exp (sample_lowered)
    sample_total = ReduceSum <keepdims: int = 1> (sample_weights, axis_last)
    sample_weights_K = Reshape (sample_weights, K_GL_any)
    sample_sum_K = MatMul (sample_weights_K, sample_value)
    sample_sum = Reshape (sample_sum_K, KGLE)
"""
    with_anchors = f"""
    first_key = Slice (segment_key, axis_0, anchors_1, axis_1)
    first_value = Slice (segment_value, axis_0, anchors_1, axis_1)
    first_key_T = Transpose <perm: ints = [0, 2, 1]> (first_key)
    anchor_dots = MatMul (query_KXD, first_key_T)
    anchor_KGLX = Reshape (anchor_dots, KGL_any)
    {capped("anchor_scores", "anchor_KGLX", variant)}
    anchor_bias = Where (is_first, zero_f, minus_inf)
    anchor_counted = Add (anchor_scores, anchor_bias)
    anchor_top_found = ReduceMax <keepdims: int = 1> (anchor_counted, axis_last)
    anchor_top = Max (anchor_top_found, lowest)
    anchor_lowered = Sub (anchor_counted, anchor_top)
    anchor_weights = Exp (anchor_lowered)
    anchor_total = ReduceSum <keepdims: int = 1> (anchor_weights, axis_last)
    anchor_weights_K = Reshape (anchor_weights, K_GL_any)
    anchor_sum_K = MatMul (anchor_weights_K, first_value)
    anchor_sum = Reshape (anchor_sum_K, KGLE)
"""
    parts = ["heavy", "sample", *(["anchor"] if variant.anchors else [])]
    merge = f"top_after = Max (top_now, {', '.join(f'{part}_top' for part in parts)})\n"
    for part, top, total, value in [("old", "top_now", "total_now", "sum_now"),
                                    *((part, f"{part}_top", f"{part}_total", f"{part}_sum") for part in parts)]:
        merge += (f"{part}_fall = Sub ({top}, top_after)\n{part}_factor = Exp ({part}_fall)\n"
                  f"{part}_total_part = Mul ({total}, {part}_factor)\n{part}_sum_part = Mul ({value}, {part}_factor)\n")
    names = ["old", *parts]
    merge += f"total_after = Sum ({', '.join(f'{part}_total_part' for part in names)})\n"
    merge += f"sum_after = Sum ({', '.join(f'{part}_sum_part' for part in names)})\n"
    if variant.anchors:
        heavy_mask = anchor_mask.replace("KEY_INDEX", "key_order").replace("NAME", "heavy_is_anchor") + """
    heavy_bias = Where (heavy_is_anchor, minus_inf, zero_f)
    heavy_bias_shape = Concat <axis: int = 0> (K, bucket_count_1, single, bucket_keys_1)
    heavy_bias_4 = Reshape (heavy_bias, heavy_bias_shape)
    heavy_counted = Add (heavy_scores, heavy_bias_4)
"""
        sample_mask = anchor_mask.replace("key_is", "sample_is").replace("KEY_INDEX", "sample").replace(
            "NAME", "sample_anchor") + """
    sample_anchor_4 = Unsqueeze (sample_anchor, axes_1_2)
    is_left_out = Or (same_bucket, sample_anchor_4)
"""
    else:
        heavy_mask, sample_mask = "heavy_counted = Identity (heavy_scores)", "is_left_out = Identity (same_bucket)"
    segment = segment.replace("HEAVY_MASK", heavy_mask).replace("SAMPLE_MASK", sample_mask)
    of_leaf = own + """
    rest_end, sum_end, top_end, total_end = Loop (segments_most, has_prefix, t, own_sum, own_top, own_total) <
        body = of_segment (int64 number, bool more, int64 rest_leaves, float[k, g, l, e] sum_now,
                           float[k, g, l, 1] top_now, float[k, g, l, 1] total_now)
            => (bool more_after, int64 rest_after, float[k, g, l, e] sum_after, float[k, g, l, 1] top_after,
                float[k, g, l, 1] total_after) {
""" + segment + (with_anchors if variant.anchors else "") + merge + """
    }>
    top_all = Max (top_end, sink_KG11)
    end_fall = Sub (top_end, top_all)
    end_factor = Exp (end_fall)
    sink_fall = Sub (sink_KG11, top_all)
    sink_weight = Exp (sink_fall)
    total_part = Mul (total_end, end_factor)
    total_all = Add (total_part, sink_weight)
    sum_all = Mul (sum_end, end_factor)
    mean_slot = Div (sum_all, total_all)
    part = GatherND <batch_dims: int = 2> (mean_slot, slot_1)
"""
    after = """
    places_BSKG_shape = Concat <axis: int = 0> (B, S, K, G)
    places_BSKG = Reshape (row_place, places_BSKG_shape)
    places_BKGS = Transpose <perm: ints = [0, 2, 3, 1]> (places_BSKG)
    places_shape = Concat <axis: int = 0> (B, K, minus_one)
    places_flat = Reshape (places_BKGS, places_shape)
    selection_long = Concat <axis: int = -1> (key_place, places_flat)
"""
    return Method(before, of_leaf, after)
