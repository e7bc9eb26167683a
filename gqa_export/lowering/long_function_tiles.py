"""Method tiles of the body of `gqa::LongGroupedQueryAttention`, as ONNX text.

All scores of a leaf's rows lie side by side and are normalized once. Names from around are those of `long_function`.
"""

from __future__ import annotations

from .long_function_parts import SAMPLES, Method, Variant, capped


def tiles(variant: Variant) -> Method:
    """Blocks of keys, chosen by the rows of each tile."""
    before = """
    J = Div (leaf_, tile_)
    J_1 = Unsqueeze (J, axis_0)
    tile_1 = Unsqueeze (tile_, axis_0)
    block_1 = Unsqueeze (block_, axis_0)
    blocks = Div (heavy_keys_, block_)
    blocks_1 = Unsqueeze (blocks, axis_0)
    tile_number = Range (zero, J, one)
    tile_from = Mul (tile_number, tile_)
    tile_to = Add (tile_from, tile_)
    voter = Range (zero, score_rows_, one)
    voter_end = Add (voter, one)
    score_rows_1 = Unsqueeze (score_rows_, axis_0)
    G_tile = Mul (G, tile_1)
    G_voters = Mul (G, score_rows_1)
    last_of_leaf = Sub (leaf_, one)
    KGJRD = Concat <axis: int = 0> (K, G, J_1, tile_1, D)
    KJXD = Concat <axis: int = 0> (K, J_1, G_tile, D)
    KJX_any = Concat <axis: int = 0> (K, J_1, G_tile, minus_one)
    KX_any = Concat <axis: int = 0> (K, minus_one, leaf_1)
    KGJgD = Concat <axis: int = 0> (K, G, J_1, score_rows_1, D)
    KJg_blocks = Concat <axis: int = 0> (K, J_1, G_voters, minus_one, block_1)
    KJGRE = Concat <axis: int = 0> (K, J_1, G, tile_1, E)
    K_all_E = Concat <axis: int = 0> (K, minus_one, E)
    K_all = Concat <axis: int = 0> (K, minus_one)
    KJ_keys_D = Concat <axis: int = 0> (K, J_1, minus_one, D)
    KJ_keys_E = Concat <axis: int = 0> (K, J_1, minus_one, E)
    K_blocks_D = Concat <axis: int = 0> (K, minus_one, block_1, D)
    K_blocks_E = Concat <axis: int = 0> (K, minus_one, block_1, E)
    block_pad = Sub (block_, one)
    anchors_up = Add (anchors_, block_pad)
    forced = Div (anchors_up, block_)
    huge = Constant <value_float: float = 1e30> ()
    nothing_chosen = Constant <value_int: int = -1> ()
    axes_2_4 = Constant <value_ints: ints = [2, 4]> ()
    no_pads = Constant <value_ints: ints = [0, 0, 0, 0, 0]> ()
    triangle_shape = Concat <axis: int = 0> (single, J_1, single, tile_1, minus_one)
    sink_KG = Concat <axis: int = 0> (K, single, G, single, single)
    sink_KGR = Concat <axis: int = 0> (K, J_1, G, tile_1, single)
    sink_at = Reshape (sink_32, sink_KG)
    sink_rows = Expand (sink_at, sink_KGR)
    sink_KJX1 = Reshape (sink_rows, KJX_any)
    chosen_none_shape = Concat <axis: int = 0> (K, J_1, blocks_1)
    chosen_none = Expand (nothing_chosen, chosen_none_shape)
"""
    own = f"""
    query_KGJRD = Reshape (query_KGLD, KGJRD)
    query_KJGRD = Transpose <perm: ints = [0, 2, 1, 3, 4]> (query_KGJRD)
    query_KXD = Reshape (query_KJGRD, K_rows_D)
    own_dots = MatMul (query_KXD, own_key_T)
    own_KJXX = Reshape (own_dots, KJX_own)
    {capped("own_scores", "own_KJXX", variant)}
    triangle_tiles = Reshape (triangle_LX, triangle_shape)
    triangle_group_shape = Concat <axis: int = 0> (single, J_1, G, tile_1, own_width)
    triangle_group = Expand (triangle_tiles, triangle_group_shape)
    triangle_rows_shape = Concat <axis: int = 0> (single, J_1, G_tile, own_width)
    triangle_rows = Reshape (triangle_group, triangle_rows_shape)
    own_visible = Add (own_scores, triangle_rows)
"""
    prefix = f"""
    prefix_from = Concat <axis: int = 0> (b_1, axis_0)
    prefix_to = Concat <axis: int = 0> (after_b, start_1)
    prefix_key_1 = Slice (key_32, prefix_from, prefix_to, axes_0_2)
    prefix_key = Squeeze (prefix_key_1, axis_0)
    prefix_value_1 = Slice (value_32, prefix_from, prefix_to, axes_0_2)
    prefix_value = Squeeze (prefix_value_1, axis_0)
    width = Identity (start)
    rows_from = Max (low, tile_from)
    rows_to = Min (high, tile_to)
    rows_difference = Sub (rows_to, rows_from)
    rows_of_tile = Max (rows_difference, zero)
    rows_J1 = Unsqueeze (rows_of_tile, axis_1)
    votes_of = Mul (rows_J1, voter_end)
    voter_up = Div (votes_of, score_rows_)
    voter_at = Sub (voter_up, one)
    voter_from_0 = Max (voter_at, zero)
    rows_from_J1 = Unsqueeze (rows_from, axis_1)
    voter_row = Add (rows_from_J1, voter_from_0)
    voter_row_within = Min (voter_row, last_of_leaf)
    voters = Reshape (voter_row_within, minus_one)
    voting_KGXD = Gather <axis: int = 2> (query_KGLD, voters)
    voting_KGJgD = Reshape (voting_KGXD, KGJgD)
    voting_KJGgD = Transpose <perm: ints = [0, 2, 1, 3, 4]> (voting_KGJgD)
    voting = Reshape (voting_KJGgD, K_rows_D)
    prefix_key_T = Transpose <perm: ints = [0, 2, 1]> (prefix_key)
    vote_dots = MatMul (voting, prefix_key_T)
    {capped("vote_scores", "vote_dots", variant)}
    vote_weights = Softmax <axis: int = -1> (vote_scores)
    vote_blocks = Reshape (vote_weights, KJg_blocks)
    mass = ReduceSum <keepdims: int = 0> (vote_blocks, axes_2_4)
    block_count = Shape <start: int = 2, end: int = 3> (mass)
    block_count_0 = Squeeze (block_count, axis_0)
    block_number = Range (zero, block_count_0, one)
    is_forced = Less (block_number, forced)
    ranked = Where (is_forced, huge, mass)
    few_1 = Min (blocks_1, block_count)
    top_mass, top_block = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (ranked, few_1)
    missing = Sub (blocks_1, few_1)
    pads = Concat <axis: int = 0> (no_pads, missing)
    padded_blocks = Pad (top_block, pads, nothing_chosen)
    has_rows_J = Greater (rows_of_tile, zero)
    not_beyond = Not (beyond)
    counts_J = And (has_rows_J, not_beyond)
    counts_J1 = Unsqueeze (counts_J, axis_1)
    chosen_KJx = Where (counts_J1, padded_blocks, nothing_chosen)
{SAMPLES.replace("KEYS", "prefix_key").replace("VALUES", "prefix_value")}
    sample_block = Div (sample, block_)
    sample_block_4 = Unsqueeze (sample_block, axes_1_3)
    top_block_4 = Unsqueeze (top_block, axis_2)
    hit_each = Equal (sample_block_4, top_block_4)
    hit_number = Cast <to: int = 6> (hit_each)
    hits = ReduceMax <keepdims: int = 0> (hit_number, axis_last)
    is_hit = Cast <to: int = 9> (hits)
    sample_bias_3 = Where (is_hit, minus_inf, log_weight)
    sample_bias = Unsqueeze (sample_bias_3, axis_2)
    sample_dots = MatMul (query_KXD, sample_key_T)
    sample_KJX = Reshape (sample_dots, KJX_any)
    {capped("sample_scores", "sample_KJX", variant)}
    sample_counted = Add (sample_scores, sample_bias)
    key_blocks = Reshape (prefix_key, K_blocks_D)
    value_blocks = Reshape (prefix_value, K_blocks_E)
    top_block_K = Reshape (top_block, K_all)
    top_block_K1 = Unsqueeze (top_block_K, axis_last)
    heavy_key_blocks = GatherND <batch_dims: int = 1> (key_blocks, top_block_K1)
    heavy_key = Reshape (heavy_key_blocks, KJ_keys_D)
    heavy_value_blocks = GatherND <batch_dims: int = 1> (value_blocks, top_block_K1)
    heavy_value = Reshape (heavy_value_blocks, KJ_keys_E)
    heavy_key_T = Transpose <perm: ints = [0, 1, 3, 2]> (heavy_key)
    query_KJXD = Reshape (query_KXD, KJXD)
    heavy_dots = MatMul (query_KJXD, heavy_key_T)
    {capped("heavy_scores", "heavy_dots", variant)}
    all_scores = Concat <axis: int = -1> (heavy_scores, sample_counted, own_visible, sink_KJX1)
    all_weights = Softmax <axis: int = -1> (all_scores)
    heavy_width = Mul (few_1, block_1)
    widths = Concat <axis: int = 0> (heavy_width, enough_1, own_width, single)
    heavy_weights, sample_weights, own_weights, sink_weights = Split <axis: int = -1> (all_weights, widths)
    heavy_mean = MatMul (heavy_weights, heavy_value)
    sample_rows_shape = Concat <axis: int = 0> (K, minus_one, enough_1)
    sample_weights_K = Reshape (sample_weights, sample_rows_shape)
    sample_mean = MatMul (sample_weights_K, sample_value)
    own_rows_shape = Concat <axis: int = 0> (K, minus_one, own_width)
    own_weights_K = Reshape (own_weights, own_rows_shape)
    own_mean = MatMul (own_weights_K, own_value)
    heavy_mean_K = Reshape (heavy_mean, K_all_E)
    mean_prefix = Sum (heavy_mean_K, sample_mean, own_mean)
"""
    nothing = """
    chosen_KJ_none = Identity (chosen_none)
    alone_scores = Concat <axis: int = -1> (own_visible, sink_KJX1)
    alone_weights = Softmax <axis: int = -1> (alone_scores)
    alone_widths = Concat <axis: int = 0> (own_width, single)
    alone_own, alone_sink = Split <axis: int = -1> (alone_weights, alone_widths)
    alone_shape = Concat <axis: int = 0> (K, minus_one, own_width)
    alone_K = Reshape (alone_own, alone_shape)
    mean_alone = MatMul (alone_K, own_value)
"""
    of_leaf = own.replace("KJX_own", "KJX_any") + """
    has_prefix = Greater (t, zero)
    mean_KXE, chosen_KJ = If (has_prefix) <
        then_branch = with_prefix () => (float[k, x, e] mean_prefix, int64[k, j, c] chosen_KJx) {
""" + prefix + """
        },
        else_branch = without_prefix () => (float[k, x, e] mean_alone, int64[k, j, c] chosen_KJ_none) {
""" + nothing + """
        }
    >
    chosen = Reshape (chosen_KJ, K_all)
    mean_KJGRE = Reshape (mean_KXE, KJGRE)
    mean_KGJRE = Transpose <perm: ints = [0, 2, 1, 3, 4]> (mean_KJGRE)
    part = Reshape (mean_KGJRE, KGLE)
"""
    after = """
    chosen_shape = Concat <axis: int = 0> (B, N_1, K, minus_one)
    N_1 = Unsqueeze (N, axis_0)
    chosen_BNKC = Reshape (leaf_chosen, chosen_shape)
    chosen_BKNC = Transpose <perm: ints = [0, 2, 1, 3]> (chosen_BNKC)
    selection_shape = Concat <axis: int = 0> (B, K, minus_one)
    selection_long = Reshape (chosen_BKNC, selection_shape)
"""
    lines = after.strip().splitlines()
    lines[0], lines[1] = lines[1], lines[0]
    return Method(before, of_leaf, "\n".join(lines))
