"""Tiles and splits: within shared memory, enough to fill a GPU, no more than there are keys. No kernel runs here."""

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
def test_splits_never_leave_less_than_the_least_share_of_keys(sequences, kv_heads, row_tiles, keys, sm_count):
    splits = plan.choose_splits(sequences, kv_heads, row_tiles, keys, sm_count)
    assert 1 <= splits <= plan.MAX_SPLITS
    assert splits == 1 or keys // splits >= plan.MIN_KEYS_PER_SPLIT
    assert splits == 1 or sequences * kv_heads * row_tiles * (splits - 1) < sm_count * plan.BLOCKS_PER_SM


@pytest.mark.parametrize(("batch", "bound", "kind", "splits"), [
    (1, 32768, "decode", 32),  # 8 programs alone would leave 124 of 132 SMs idle; 256 of 264 places are filled
    (16, 32768, "decode", 2),  # 128 programs, twice
    (64, 32768, "prefill", 1),  # 512 programs fill the GPU: no combine
    (1, 200, "prefill", 1),  # too short to share
])
def test_llama_shape_on_132_sms(batch, bound, kind, splits) -> None:
    made = plan.plan(sequences=batch, steps=1, heads=32, kv_heads=8, head=128, value_head=128, dtype="bf16", window=0,
                     bound=bound, sm_count=132, capability=90)
    assert (made.kind, made.splits) == (kind, splits)
    assert made.tiles.rows == 16


def test_window_bounds_the_keys_that_are_shared_out() -> None:
    made = plan.plan(sequences=1, steps=1, heads=8, kv_heads=4, head=256, value_head=256, dtype="bf16", window=512,
                     bound=131072, sm_count=132, capability=90)
    assert made.splits == 2


def test_long_prompts_are_not_split_and_short_chunks_over_a_long_cache_are() -> None:
    shape = {"sequences": 1, "heads": 32, "kv_heads": 8, "head": 128, "value_head": 128, "dtype": "fp16", "window": 0,
             "sm_count": 132, "capability": 90}
    assert plan.plan(steps=8192, bound=8192, **shape).kind == "prefill"
    chunk = plan.plan(steps=64, bound=65536, **shape)
    assert chunk.kind == "decode"
    assert chunk.tiles.rows == 128


def test_workspace_is_one_partial_and_one_sum_per_row_and_split() -> None:
    assert plan.workspace_elements(2, 3, 8, 64, 5) == (2 * 3 * 8 * 5 * 64, 2 * 3 * 8 * 5)
