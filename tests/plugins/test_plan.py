"""Tiles and programs: within shared memory, enough to fill a GPU, no more than there are keys. No kernel runs here."""

from __future__ import annotations

import pytest
from gqa_plugins.grouped_attention import plan
from hypothesis import given, settings
from hypothesis import strategies as st


@given(st.integers(1, 256), st.integers(1, 256), st.integers(1, 5000), st.sampled_from(sorted(plan.DTYPE_BYTES)),
       st.sampled_from(plan.CAPABILITIES))
@settings(max_examples=300, deadline=None)
def test_tiles_are_powers_of_two_that_hold_the_rows_and_fit_shared_memory(head, value_head, rows, dtype, capability):
    tiles = plan.choose_tiles(rows, head, value_head, dtype, capability)
    for size in (tiles.rows, tiles.keys):
        assert size >= 16
        assert size & (size - 1) == 0
    assert tiles.rows <= plan.LONG_ROWS
    width = plan.block(head) + plan.block(value_head)
    held = tiles.keys * width * max(1, tiles.stages - 1) + tiles.rows * plan.block(head)
    assert held * plan.DTYPE_BYTES[dtype] <= plan.SHARED_KIB[capability] * 1024


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 40), st.integers(0, 2**20), st.integers(1, 200))
@settings(max_examples=300, deadline=None)
def test_programs_fill_the_sms_and_none_could_get_less_than_the_least_keys(sequences, kv_heads, row_tiles, keys, sms):
    programs = plan.choose_programs(sequences, kv_heads, row_tiles, keys, sms)
    works = sequences * kv_heads * row_tiles
    assert 1 <= programs <= sms * plan.BLOCKS_PER_SM
    assert programs <= works or works * keys // programs >= plan.LEAST_KEYS
    assert programs == sms * plan.BLOCKS_PER_SM or programs == works * max(1, keys // plan.LEAST_KEYS)


@pytest.mark.parametrize(("batch", "bound", "kind", "programs"), [
    (1, 32768, "decode", 264),  # 8 programs alone would leave 124 of 132 SMs idle
    (16, 32768, "decode", 264),
    (64, 32768, "decode", 264),  # 512 works: a program has two, or parts of three, and a long sequence is shared
    (1, 600, "decode", 16),  # no less than 256 keys each
    (1, 200, "prefill", 1),  # too short to share
])
def test_llama_shape_on_132_sms(batch, bound, kind, programs) -> None:
    made = plan.plan(sequences=batch, steps=1, heads=32, kv_heads=8, head=128, value_head=128, dtype="bf16", window=0,
                     bound=bound, sm_count=132, capability=90)
    assert (made.kind, made.programs) == (kind, programs)
    assert made.tiles.rows == 16


def test_window_bounds_the_keys_that_are_shared_out() -> None:
    made = plan.plan(sequences=1, steps=1, heads=8, kv_heads=4, head=256, value_head=256, dtype="bf16", window=512,
                     bound=131072, sm_count=132, capability=90)
    assert made.programs == 8


@pytest.mark.parametrize(("head", "value_head", "dtype", "capability", "ahead"), [
    (128, 128, "bf16", 90, True), (80, 128, "fp16", 90, True), (64, 64, "bf16", 90, True),
    (256, 256, "bf16", 90, False), (128, 64, "bf16", 90, False), (32, 32, "bf16", 90, False),  # spills or is in turn
    (128, 128, "fp32", 90, False), (128, 128, "bf16", 80, False), (128, 128, "bf16", 100, False),
])
def test_prefill_works_ahead_where_products_run_on_their_own(head, value_head, dtype, capability, ahead) -> None:
    made = plan.plan(sequences=1, steps=4096, heads=8, kv_heads=2, head=head, value_head=value_head, dtype=dtype,
                     window=0, bound=4096, sm_count=132, capability=capability)
    assert (made.kind, made.ahead) == ("prefill", ahead)


def test_long_prompts_are_not_split_and_short_chunks_over_a_long_cache_are() -> None:
    shape = {"sequences": 1, "heads": 32, "kv_heads": 8, "head": 128, "value_head": 128, "dtype": "fp16", "window": 0,
             "sm_count": 132, "capability": 90}
    assert plan.plan(steps=8192, bound=8192, **shape).kind == "prefill"
    chunk = plan.plan(steps=64, bound=65536, **shape)
    assert chunk.kind == "decode"
    assert chunk.tiles.rows == 128


def test_workspace_is_a_partial_and_a_sum_per_row_of_a_tile_and_meeting() -> None:
    """5 programs and 2 x 2 works; 3 steps x 4 heads of a group are 12 rows of a tile of 16."""
    assert plan.workspace_elements(2, 3, 8, 2, 64, 16, 5) == (12 * 9 * 64, 12 * 9, 2 * 2 * 3 * 8)
    assert plan.workspace_elements(2, 9, 8, 2, 64, 16, 5)[1] == 16 * (5 + 2 * 2 * 3), "36 rows are three tiles"
