"""Append, prefill and decode against fp64, through the interpreter: pairwise over shapes, types and features.

Tiles are 16 x 16, so that lengths of 15 .. 49 lie on both sides of the edges. bf16 passes through `primitives.dot`,
which widens when interpreted: that proves indexing and rounding, not a GPU's bf16 products.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    SMALL,
    Case,
    assert_cache_holds_new_tokens,
    assert_close_as_eager,
    assert_guards,
    make,
    pairwise,
    run_kernels,
    truth,
)
from gqa_plugins.grouped_attention.plan import Tiles

pytestmark = pytest.mark.kernels

# Kernel, (past, new) per sequence, S: tile edges at 16 and 32, an empty sequence, ragged new lengths.
SHAPES = [
    ("decode", ((15, 1), (0, 0), (16, 1)), 1),
    ("decode", ((31, 1), (32, 1), (0, 1)), 1),
    ("decode", ((29, 4), (0, 3), (48, 1)), 4),
    ("prefill", ((0, 15), (0, 17)), 17),
    ("prefill", ((14, 2), (31, 0), (15, 1)), 2),
    ("prefill", ((29, 5), (0, 3), (48, 4)), 5),
    ("prefill", ((0, 33),), 33),
]
FACTORS = {
    "shape": SHAPES,
    "kv_heads": [1, 2],
    "group": [1, 3, 7, 8, 16],  # one head, rows of a tile left over twice, half a tile, a whole one
    "head": [8, 40, 64, 96, 256],  # padded to a power of two or one already; others differ in neither
    "value_head": ["same", 24],
    "dtype": ["fp16", "fp32"],
    "window": [0, 1, 16, 17],
    "softcap": [0.0, 5.0],
    "sinks": [False, True],
    "rotary": [0, "half", "interleaved"],
}
ROWS = pairwise(FACTORS)


def case_of(row: dict) -> Case:
    _, lengths, steps = row["shape"]
    head = row["head"]
    return Case(lengths, steps, heads=row["kv_heads"] * row["group"], kv_heads=row["kv_heads"], head=head,
                value_head=head if row["value_head"] == "same" else row["value_head"], dtype=row["dtype"],
                window=row["window"], softcap=row["softcap"], sinks=row["sinks"],
                rotary=head // 2 if row["rotary"] else 0, interleaved=row["rotary"] == "interleaved")


def name_of(row: dict) -> str:
    return "-".join(str(row[name]) for name in row if name != "shape") + f"-{row['shape'][0]}{row['shape'][2]}"


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_kernels_are_as_close_to_fp64_as_twice_eager(row: dict) -> None:
    problem = make(case_of(row))
    before_key, before_value = problem.past_key.clone(), problem.past_value.clone()
    output = run_kernels(problem, row["shape"][0])
    assert_cache_holds_new_tokens(problem, before_key, before_value)
    problem.past_key.copy_(before_key)
    problem.past_value.copy_(before_value)
    assert_close_as_eager(output, problem)


@pytest.mark.parametrize("row", ROWS[::7], ids=name_of)
def test_bf16_is_as_close_to_fp64_as_twice_eager_when_widened(row: dict) -> None:
    problem = make(case_of({**row, "dtype": "bf16"}))
    before_key, before_value = problem.past_key.clone(), problem.past_value.clone()
    output = run_kernels(problem, row["shape"][0])
    assert_cache_holds_new_tokens(problem, before_key, before_value)
    problem.past_key.copy_(before_key)
    problem.past_value.copy_(before_value)
    assert_close_as_eager(output, problem)


def test_every_pair_of_factor_levels_is_covered() -> None:
    names = list(FACTORS)
    for a, first in enumerate(names):
        for second in names[a + 1:]:
            for x in FACTORS[first]:
                for y in FACTORS[second]:
                    assert any(row[first] == x and row[second] == y for row in ROWS), (first, x, second, y)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("total", [15, 16, 17])
def test_window_is_exact_one_below_at_and_one_above_its_width(kind: str, total: int) -> None:
    """Window 16 with 15, 16 and 17 tokens: the first token is hidden from the last row only at 17."""
    problem = make(Case(((total - 3, 3),), 3, window=16))
    before = problem.past_value.clone()
    output = run_kernels(problem, kind)
    problem.past_value.copy_(before)
    assert_close_as_eager(output, problem)
    problem = make(Case(((total - 3, 3),), 3, window=16))
    problem.past_value[:, :, 0] += 100
    moved = run_kernels(problem, kind)
    changed = (moved != output).any(-1)[0]
    assert changed.tolist() == [True, total <= 17 and total - 2 < 16, total - 1 < 16]


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_length_past_capacity_gives_nan_rows_and_writes_nothing_beyond(kind: str) -> None:
    """Sequence 1 has room for one of its three tokens; sequence 2 starts past the end; sequence 3 is negative."""
    case = Case(((3, 2), (15, 3), (40, 2), (-4, 2), (4, 9)), 3, capacity=16)
    problem = make(Case(((3, 2), (15, 3), (16, 2), (0, 2), (4, 3)), 3, capacity=16))
    problem.past_lengths.copy_(torch.tensor([past for past, _ in case.lengths]))
    problem.new_lengths.copy_(torch.tensor([new for _, new in case.lengths]))
    before = problem.past_key.clone()
    output = run_kernels(problem, kind)
    assert output[0, :2].isfinite().all()
    assert (output[0, 2] == 0).all()
    assert output[1].isnan().all()
    assert output[2, :2].isnan().all()
    assert (output[2, 2] == 0).all()
    assert output[3, :2].isnan().all()
    assert output[4].isnan().all()
    assert_guards(problem.guards)
    for b in (2, 3):
        same = (problem.past_key[b] == before[b]) | (problem.past_key[b].isnan() & before[b].isnan())
        assert same.all(), f"sequence {b}, which does not fit, was written"
    expected, _, _ = truth(problem)
    assert torch.equal(output.isnan(), expected.isnan())


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_row_that_sees_nothing_is_zero_with_and_without_sinks(kind: str) -> None:
    for sinks in (False, True):
        problem = make(Case(((0, 0), (0, 0)), 2, sinks=sinks))
        assert (run_kernels(problem, kind) == 0).all()
        assert_guards(problem.guards)


@pytest.mark.parametrize("programs", [1, 2, 7, 17, 40])
def test_number_of_programs_does_not_change_the_result(programs: int) -> None:
    """Including more programs than tiles, and more than the 16 partial results that combine reads at a time."""
    problem = make(Case(((60, 1), (3, 1)), 1, sinks=True, dtype="fp32"))
    output = run_kernels(problem, "decode", programs=programs)
    assert_close_as_eager(output, problem)


def test_output_depends_on_the_share_and_not_on_the_number_of_programs() -> None:
    """Bit by bit: 4 tiles each is what 4 programs get of 13 tiles, and what more get because it is the least."""
    made = Case(((170, 1), (0, 1), (3, 1), (0, 0)), 1, capacity=180, kv_heads=1, dtype="fp32")
    outputs = [run_kernels(make(made), "decode", programs=programs, least_keys=least)
               for programs, least in ((4, 1), (4, 64), (9, 64))]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], run_kernels(make(made), "decode", programs=2))


def test_more_sequences_than_are_counted_at_a_time() -> None:
    """64 at a time; some are empty, some have nothing new, one is longer than all others together."""
    lengths = tuple((0 if b % 5 == 0 else 7 * b % 30, int(b % 3 > 0)) for b in range(70))
    problem = make(Case((*lengths, (90, 1)), 1, capacity=96, heads=2, kv_heads=1, window=40))
    assert_close_as_eager(run_kernels(problem, "decode", programs=6), problem)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize(("group", "steps"), [(1, 20), (64, 1), (71, 1), (8, 5)])
def test_groups_larger_than_a_row_tile_are_tiled(kind: str, group: int, steps: int) -> None:
    problem = make(Case(((21, steps), (0, steps)), steps, heads=group, kv_heads=1, window=11))
    assert_close_as_eager(run_kernels(problem, kind), problem)


@pytest.mark.parametrize("tiles", [Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1), Tiles(64, 64, 4, 2), Tiles(128, 32, 8, 3)])
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_tile_shape_does_not_change_the_result(kind: str, tiles: Tiles) -> None:
    problem = make(Case(((19, 30), (0, 21)), 30, window=33, dtype="fp16"))
    assert_close_as_eager(run_kernels(problem, kind, tiles), problem)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("head", [40, 128])
def test_prefill_that_works_ahead_is_as_close_to_fp64(head: int, softcap: float) -> None:
    """Rows that have no inside of the band, one tile of it, and several; both ways to scale."""
    problem = make(Case(((0, 40), (50, 40), (5, 1)), 40, capacity=100, head=head, value_head=head, dtype="fp16",
                        softcap=softcap, sinks=True, window=70))
    assert_close_as_eager(run_kernels(problem, "prefill", ahead=True), problem)


def test_decode_step_equals_last_row_of_prefill() -> None:
    whole = make(Case(((0, 40),), 40, dtype="fp32"))
    rows = run_kernels(whole, "prefill")
    step = make(Case(((39, 1),), 1, dtype="fp32"))
    step.query.copy_(whole.query[:, 39:])
    step.key.copy_(whole.key[:, 39:])
    step.value.copy_(whole.value[:, 39:])
    step.past_key[:, :, :39] = whole.past_key[:, :, :39]
    step.past_value[:, :, :39] = whole.past_value[:, :, :39]
    # The same fp32 numbers added in another order: 40 terms of at most about 4 in size.
    assert (run_kernels(step, "decode")[:, 0] - rows[:, 39]).abs().max() < 40 * 4 * 2**-23


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_sequence_in_a_ragged_batch_equals_that_sequence_alone(kind: str) -> None:
    """Bit by bit; decode where the cut is the same: a single program cuts no sequence."""
    batch = make(Case(((7, 3), (0, 0), (30, 5), (0, 1)), 5, dtype="fp32", sinks=True))
    keys, values = batch.past_key.clone(), batch.past_value.clone()
    together = run_kernels(batch, kind, programs=1)
    for b in (0, 2, 3):
        past, new = batch.case.lengths[b]
        alone = make(Case(((past, new),), new, dtype="fp32", sinks=True))
        for name in ("query", "key", "value"):
            getattr(alone, name).copy_(getattr(batch, name)[b: b + 1, :new])
        alone.past_key.copy_(keys[b: b + 1])
        alone.past_value.copy_(values[b: b + 1])
        alone.sinks.copy_(batch.sinks)
        assert torch.equal(run_kernels(alone, kind, programs=1)[0], together[b, :new])


def test_extreme_scores_stay_finite_in_fp16() -> None:
    """Scores of thousands: the softmax is one-hot, and no exponential overflows. fp16 products would (65504)."""
    problem = make(Case(((30, 2),), 2, dtype="fp16", head=64, value_head=16))
    problem.query.mul_(60)
    problem.past_key.mul_(60)
    expected, _, _ = truth(problem)
    output = run_kernels(problem, "decode")
    assert output.isfinite().all()
    # One-hot rows copy a value exactly; a near tie is decided by fp32 sums of 64 products of size up to 1e5.
    assert (output.double() - expected).abs().max() < 2**-9 * 4


def test_small_tiles_are_what_the_tests_say() -> None:
    assert (SMALL.rows, SMALL.keys) == (16, 16)
