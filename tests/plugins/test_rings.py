"""The kernels over rings, through Triton's interpreter, against the fp64 truth over caches that keep every token.

Tiles are 16 x 16. What no new row sees is NaN, in the ring and in the tokens between.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    Case,
    assert_close_as_eager,
    assert_guards,
    assert_ring_holds_new_tokens,
    make,
    pairwise,
    ring_of,
    run_kernels,
)
from gqa_plugins.grouped_attention import grouped_query_attention

from gqa_export.errors import GqaExportError

pytestmark = pytest.mark.kernels
# Kernel, window, slots, (past, new) of each sequence, S. The seam lies within what is seen, at a tile's edge, at its
# own end, and one beside each; rings are passed four times, or not yet.
SHAPES = [
    ("decode", 16, 21, ((20, 1), (21, 1), (0, 0)), 1),
    ("decode", 17, 32, ((31, 1), (32, 1), (33, 1)), 1),
    ("decode", 33, 40, ((5, 4), (79, 3), (163, 1)), 4),
    ("decode", 1, 1, ((0, 1), (7, 1)), 1),
    ("prefill", 16, 37, ((0, 17), (37, 9), (36, 1)), 17),
    ("prefill", 30, 48, ((90, 19), (191, 5)), 19),
    ("prefill", 5, 22, ((17, 18), (3, 0)), 18),
]
FACTORS = {
    "shape": SHAPES, "kv_heads": [1, 2], "group": [1, 3], "head": [8, 40], "value_head": ["same", 24],
    "dtype": ["fp16", "bf16"], "softcap": [0.0, 5.0], "sinks": [False, True],
    "rotary": [0, "half", "interleaved"],
}


def case_of(row: dict) -> Case:
    _, window, _, lengths, steps = row["shape"]
    head = row["head"]
    return Case(lengths, steps, capacity=max(past + new for past, new in lengths) + 3,
                heads=row["kv_heads"] * row["group"], kv_heads=row["kv_heads"], head=head,
                value_head=head if row["value_head"] == "same" else row["value_head"], dtype=row["dtype"],
                window=window, softcap=row["softcap"], sinks=row["sinks"], rotary=head // 2 if row["rotary"] else 0,
                interleaved=row["rotary"] == "interleaved")


@pytest.mark.parametrize("row", pairwise(FACTORS), ids=lambda row: "-".join(map(str, row.values())))
def test_a_ring_gives_what_a_cache_of_every_token_gives(row: dict) -> None:
    kind, _, slots, _, _ = row["shape"]
    whole = make(case_of(row))
    ring, before = ring_of(whole, slots), ring_of(whole, slots)
    output = run_kernels(ring, kind, ring=True, ahead=row["softcap"] == 0)
    assert_close_as_eager(output, whole)
    assert_ring_holds_new_tokens(ring, before, whole)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_more_tokens_than_the_ring_takes_give_nan_rows_and_leave_the_others(kind: str) -> None:
    """21 slots and a window of 16 take 6 tokens. Sequence 1 brings 7; sequence 2 is negative; sequence 3 brings more
    than there are steps."""
    whole = make(Case(((50, 6), (50, 7), (0, 2), (9, 3)), 7, capacity=60, window=16))
    ring = ring_of(whole, 21)
    ring.past_lengths[2], ring.new_lengths[3] = -4, 8
    output = run_kernels(ring, kind, ring=True)
    assert_guards(ring.guards)
    expected = run_kernels(ring_of(whole, 22), kind, ring=True)
    torch.testing.assert_close(output[0], expected[0], atol=1e-6, rtol=0)  # decode's shares differ
    assert output[1].isnan().all()
    assert output[2, :2].isnan().all()
    assert (output[2, 2:] == 0).all()
    assert output[3].isnan().all()


def test_more_tokens_than_slots_write_nothing() -> None:
    whole = make(Case(((3, 9), (3, 1)), 9, capacity=20, window=4))
    ring, before = ring_of(whole, 6), ring_of(whole, 6)
    run_kernels(ring, "prefill", ring=True)
    assert torch.equal(ring.past_key[0].nan_to_num(9), before.past_key[0].nan_to_num(9))
    assert not ring.past_key[1, :, 3].isnan().any()


def test_the_entry_takes_rings_and_refuses_what_they_do_not_hold() -> None:
    case = Case(((70, 5), (20, 2)), 5, capacity=80, window=16)
    whole, arguments = make(case), {**case.attributes, "ring": True}
    outputs = []
    for backend in (None, "reference"):
        ring = ring_of(whole, 21)
        output, *_ = grouped_query_attention(*ring.tensors()[:6], new_lengths=ring.new_lengths, backend=backend,
                                             **arguments)
        outputs.append(output)
    assert_close_as_eager(outputs[0], whole)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=0)
    ring = ring_of(whole, 19)
    with pytest.raises(GqaExportError, match="takes at most 4 new tokens"):
        grouped_query_attention(*ring.tensors()[:6], new_lengths=ring.new_lengths, **arguments)
    for wrong in ({"window": 0}, {"window": 20}):
        with pytest.raises(GqaExportError, match="ring of C = 19 slots"):
            grouped_query_attention(*ring.tensors()[:6], **{**arguments, **wrong})


def test_a_graph_s_bound_beyond_the_slots_is_taken() -> None:
    """max_length is of the sequence; the launch is planned for the slots."""
    whole = make(Case(((70, 1),), 1, capacity=80, window=16))
    ring = ring_of(whole, 20)
    output, *_ = grouped_query_attention(*ring.tensors()[:6], **whole.case.attributes, ring=True, max_length=80)
    assert_close_as_eager(output, whole)
