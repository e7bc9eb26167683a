"""The op over a ring: reference and function body against the op over a cache that keeps every token.

Both are fed the same tokens, in chunks of any length that the ring takes, far past the point where slots are used
again; whatever no row sees is NaN before each call.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from gqa_export import attention_op
from gqa_export.lowering import attention_function, ring_function

from .one_op import Attributes, fresh_inputs, op_model, session, truth
from .test_attention_function import FP16_RTOL, FP32_ATOL

CACHES = ("past_key", "past_value")


def body(attributes: Attributes, dtype: int = TensorProto.FLOAT):
    model = op_model(attributes, dtype)
    attention_function.attach_function(model)
    ran = session(model)
    return lambda feeds: ran.run(None, feeds)


def slots_dead(slots: int, window: int, length: int) -> np.ndarray:
    """Slots whose token no later row sees, and those that hold none."""
    held = np.full(slots, -1)
    for token in range(length):
        held[token % slots] = token
    return (held < 0) | (held <= length - window)


def walk(attributes: Attributes, slots: int, chunks: list[list[int]], run, *, seed: int = 0, sinks: bool = False,
         dtype: type = np.float32, head: int = 8, value_head: int = 6):
    """Feed `chunks` (new tokens of each row, call after call) to the op over a ring (by `run`) and, in fp64, over a
    cache of every token; yields both outputs."""
    whole = replace(attributes, growing=0)
    rows, capacity = len(chunks[0]), max(sum(column) for column in zip(*chunks)) + 1
    lengths = [0] * rows
    ring = {name: np.full((rows, attributes.kv_num_heads, slots, size), np.nan, dtype)
            for name, size in zip(CACHES, (head, value_head))}
    every = {name: np.full((rows, attributes.kv_num_heads, capacity, size), np.nan) for name, size in
             zip(CACHES, (head, value_head))}
    for number, new in enumerate(chunks):
        feeds = fresh_inputs(attributes, lengths, new, axis=1, steps=max(*new, 1) + number % 2, head=head,
                             value_head=value_head, seed=seed + number, sinks=sinks, dtype=dtype)
        for b, length in enumerate(lengths):
            for name in CACHES:
                ring[name][b, :, slots_dead(slots, attributes.window, length)] = np.nan
        expected, *kept = truth(whole, {**feeds, **every})
        actual, *written = run({**feeds, **ring})
        ring, every = dict(zip(CACHES, map(np.array, written))), dict(zip(CACHES, kept))
        lengths = [length + count for length, count in zip(lengths, new)]
        for b, length in enumerate(lengths):  # every token that the ring can still hold is there, where it belongs
            for token in range(max(0, length - attributes.window + 1), length):
                for name in CACHES:
                    np.testing.assert_array_equal(ring[name][b, :, token % slots],
                                                  every[name][b, :, token].astype(dtype))
        yield actual, expected


@st.composite
def walks(draw):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 3), (1, 4)]))
    window, chunk = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    attributes = Attributes(kv_heads * group, kv_heads, softcap=draw(st.sampled_from([0.0, 2.0])), window=window,
                            growing=attention_op.RING)
    slots = window + chunk - draw(st.integers(0, 1))  # one slot less still holds a window and its chunk
    rows = draw(st.integers(1, 3))
    most = slots - window + 1
    calls = 2 + 4 * slots // most
    chunks = draw(st.lists(st.lists(st.integers(0, most), min_size=rows, max_size=rows), min_size=calls,
                           max_size=calls))
    return attributes, slots, [[most] * rows, *chunks], draw(st.integers(0, 999)), draw(st.booleans())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(walks())
def test_a_ring_gives_what_a_cache_of_every_token_gives(case):
    attributes, slots, chunks, seed, sinks = case
    bodies = body(attributes)
    for actual, expected in walk(attributes, slots, chunks, bodies, seed=seed, sinks=sinks):
        np.testing.assert_allclose(actual, expected, atol=FP32_ATOL, rtol=0)
    for actual, expected in walk(attributes, slots, chunks, lambda feeds: truth(attributes, feeds), seed=seed,
                                 sinks=sinks, dtype=np.float64):
        np.testing.assert_allclose(actual, expected, atol=1e-12, rtol=0)


def test_four_windows_are_passed_one_token_at_a_time_in_fp16():
    attributes = Attributes(window=5, growing=attention_op.RING)
    for actual, expected in walk(attributes, 7, [[3, 2]] + [[1, 1]] * 25, body(attributes, TensorProto.FLOAT16),
                                 dtype=np.float16):
        np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=FP16_RTOL, atol=2.0 ** -11)


@pytest.mark.parametrize("how", ["reference", "body"])
def test_more_tokens_than_a_ring_takes_give_nan_in_that_sequence_alone(how):
    attributes = Attributes(window=4, growing=attention_op.RING)
    feeds = fresh_inputs(attributes, [9, 9, -1], [3, 4, 1], axis=6, steps=4, poison=False)
    output = (truth(attributes, feeds) if how == "reference" else body(attributes)(feeds))[0]
    assert not np.isnan(output[0]).any()
    assert np.isnan(output[1]).all()
    assert np.isnan(output[2, :1]).all()


@pytest.mark.parametrize("how", ["reference", "body"])
def test_padding_writes_no_slot(how):
    """What a row can still go back to is in the slots that a padded token would take."""
    attributes = Attributes(window=4, growing=attention_op.RING)
    feeds = fresh_inputs(attributes, [11, 2], [1, 0], axis=7, steps=4, poison=False)
    for name in ("query", "key", "value"):
        feeds[name][0, 1:] = feeds[name][1] = np.nan
    _, *written = truth(attributes, feeds) if how == "reference" else body(attributes)(feeds)
    for before, after in zip((feeds["past_key"], feeds["past_value"]), written):
        kept = [slot for slot in range(7) if slot != 11 % 7]
        np.testing.assert_array_equal(after[0][:, kept], before[0][:, kept])
        np.testing.assert_array_equal(after[1][:, :2], before[1][:, :2])
        assert not np.isnan(after).any()


def test_the_same_body_still_serves_caches_that_keep_every_token():
    """A model has layers of both kinds, and one function."""
    for growing in (0, 1):
        attributes = Attributes(softcap=3.0, window=3, growing=growing)
        model = op_model(attributes)
        model.functions.append(attention_function.function_proto(23, ring=True))
        feeds = fresh_inputs(attributes, [4, 0, 2], [2, 3, 0], axis=6, steps=3, seed=3)
        expected, actual = truth(attributes, feeds), session(model).run(None, feeds)
        np.testing.assert_allclose(actual[0], expected[0], atol=FP32_ATOL)
        for b, end in enumerate((6, 3, 2)):
            for mine, theirs in zip(actual[1:], expected[1:]):
                np.testing.assert_array_equal(mine[b, :, :end], theirs[b, :, :end].astype(np.float32))


def test_a_model_without_a_ring_keeps_its_body():
    model = op_model(Attributes())
    attention_function.attach_function(model)
    assert model.functions[0].SerializeToString() == attention_function.function_proto(23).SerializeToString()
    assert not [node for node in model.functions[0].node if node.op_type == "Mod"]


def test_a_ring_without_a_window_or_smaller_than_it_is_refused():
    for window in (0, 7):
        attributes = Attributes(window=window, growing=attention_op.RING)
        with pytest.raises(ValueError, match="cannot hold a window"):
            truth(attributes, fresh_inputs(attributes, [0], [1], axis=6, steps=1))


def test_a_body_whose_lines_changed_is_not_patched_in_silence():
    with pytest.raises(ValueError, match="expected 1"):
        ring_function.with_ring("    grown = Mul (S, growing_)\n")


@pytest.mark.parametrize("window", [0, 5, -4])
def test_beside_a_ring_every_other_call_reads_its_whole_cache(window: int) -> None:
    """One body serves all calls of a graph. A window of -4 is attention in chunks of 4 positions."""
    attributes = Attributes(window=window, growing=0)
    model = op_model(attributes)
    attention_function.attach_function(model)
    del model.functions[:]
    model.functions.append(attention_function.function_proto(23, chunks=True, ring=True))
    feeds = fresh_inputs(attributes, [3, 6], [6, 2], axis=12, steps=6)
    got, expected = session(model).run(None, feeds)[0], truth(attributes, feeds)[0]
    np.testing.assert_allclose(got, expected, atol=FP32_ATOL, rtol=0)
