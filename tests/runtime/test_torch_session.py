"""The reference itself: fp64 throughout, rows that do not meet, the caller's model left alone."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from gqa_models.shrink import small_config
from refusal import refused
from transformers import AutoModelForCausalLM, DynamicCache

from gqa_export.runtime import torch_session
from gqa_export.runtime.torch_session import TorchSession, _Widen

from .conftest import CAPACITY


def test_rows_of_a_batch_equal_the_same_rows_alone(model) -> None:
    session = TorchSession(model, CAPACITY, "fp64")
    ids, new = np.random.default_rng(3).integers(0, 320, (3, 20)), np.array([20, 3, 11])
    session.reset(3)
    together = session.step(ids, new, want_cache=True)
    for b, count in enumerate(new):
        session.reset(1)
        alone = session.step(ids[b: b + 1, :count], want_cache=True)
        assert np.array_equal(together.logits[b, :count], alone.logits[0])
        for rows, own in zip((*together.keys, *together.values), (*alone.keys, *alone.values)):
            assert np.array_equal(rows[b, :, :count], own[0])
            assert not rows[b, :, count:].any()


def test_another_draw_of_rounding_moves_the_last_places_and_nothing_else(model) -> None:
    session, ids = TorchSession(model, CAPACITY), np.random.default_rng(3).integers(0, 320, (1, 20))
    plain = session.step(ids).logits
    drawn = []
    for seed in (1, 1, 2):
        session.reset(1)
        with session.redrawn(seed):
            drawn.append(session.step(ids).logits)
    session.reset(1)
    assert np.array_equal(session.step(ids).logits, plain)
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    # half a unit in the last place in each of some tens of products
    assert 0 < np.abs(drawn[0] - plain).max() < 200 * 2.0**-24 * np.abs(plain).max()


def test_the_model_is_called_by_the_names_that_its_transformers_has(model) -> None:
    session = TorchSession(model, CAPACITY)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # what transformers warns with at a name that it gave up
        session.step(np.full((1, 3), 5))


@pytest.mark.parametrize(("name", "kinds"), [
    ("lfm2", {"layer_types": ["conv"]}), ("nemotron_h", {"layers_block_type": ["mamba"]})])
def test_a_hybrid_without_a_layer_of_attention_goes_on_from_its_states(name, kinds) -> None:
    """transformers has no keys to count there, and counts them for the masks and positions of hybrids."""
    torch.manual_seed(0)
    hybrid = AutoModelForCausalLM.from_config(small_config(name, num_hidden_layers=1, **kinds))
    session, ids = TorchSession(hybrid, CAPACITY, "fp64"), np.random.default_rng(3).integers(4, 320, (1, 7))
    whole = session.step(ids).logits
    session.reset(1)
    pieces = [session.step(ids[:, start: stop]).logits for start, stop in ((0, 4), (4, 5), (5, 7))]
    # fp64: some tens of roundings of 2^-53 of logits below 10
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=0, atol=1e-13 * np.abs(whole).max() + 1e-13)


def test_the_whole_cache_is_kept_beyond_a_window(model) -> None:
    session = TorchSession(model, CAPACITY)
    session.step(np.full((1, 30), 5))  # the window is 16
    assert [key.shape for key, _ in session.cache()] == [(1, 2, 30, 16)] * 2


def test_a_step_writes_behind_what_is_cached_and_changes_nothing_that_was_handed_out(model, monkeypatch) -> None:
    """Joined anew at every step, as transformers does it, a cache is copied whole each time, and old and new are there
    together. The answers are the same to the last bit."""
    ids = np.random.default_rng(8).integers(0, 320, (1, 29))
    pieces = [(0, 9), (9, 10), (10, 17), (17, 18), (18, 19), (19, 29)]

    def walked(session) -> tuple[list, list]:
        session.reset(1)
        steps, places = [], []
        for start, stop in pieces:
            steps.append(session.step(ids[:, start:stop], want_cache=True))
            places.append([layer.keys.data_ptr() for layer in session._caches[0].layers])
        return steps, places

    session = TorchSession(model, CAPACITY, "fp64")
    steps, places = walked(session)
    moved = [number for number, (one, two) in enumerate(itertools.pairwise(places), 1) if one != two]
    assert moved == [1, 4], "rooms of 9, 18 and 36 tokens"
    handed = session.cache()
    before = [array.copy() for pair in handed for array in pair]
    session.rewind_row(0, 5)
    session.step(ids[:, :20])
    for was, now in zip(before, (array for pair in handed for array in pair), strict=True):
        assert np.array_equal(was, now)
    plain = TorchSession(model, CAPACITY, "fp64")
    monkeypatch.setattr(torch_session, "roomy_cache", lambda capacity: DynamicCache())
    for one, two in zip(steps, walked(plain)[0], strict=True):
        for mine, theirs in zip((one.logits, *one.keys, *one.values), (two.logits, *two.keys, *two.values)):
            assert np.array_equal(mine, theirs)


def test_a_cache_never_has_room_for_more_than_the_capacity(model) -> None:
    session = TorchSession(model, 24)
    for width in (15, 1, 8):
        session.step(np.full((1, width), 5))
    assert {room.shape[-2] for layer in session._caches[0].layers for room, _ in layer._rooms.values()} == {24}


def test_decode_steps_equal_the_rows_of_one_prefill(model) -> None:
    ids = np.random.default_rng(4).integers(0, 320, (1, 24))
    session = TorchSession(model, CAPACITY, "fp64")
    whole = session.step(ids).logits
    session.reset(1)
    steps = np.concatenate([session.step(ids[:, i: i + 1]).logits for i in range(24)], axis=1)
    # fp64 sums of the same terms; only the rotary angles are fp32, and those are the same
    assert np.abs(whole - steps).max() < 1e-11


def test_an_fp64_session_computes_norms_and_softmax_in_fp64(model) -> None:
    """transformers casts both to fp32 by name; a model that is merely doubled keeps fp32's error."""
    import copy

    doubled = copy.deepcopy(model).double()
    ids = np.arange(20)[None] + 3
    with torch.no_grad():
        plain = doubled(torch.from_numpy(ids)).logits.numpy()
    widened = TorchSession(model, CAPACITY, "fp64").step(ids).logits
    gap = np.abs(plain - widened).max() / np.abs(widened).max()
    assert 1e-10 < gap < 1e-5


def test_widening_spares_what_happens_inside_a_rotary_module() -> None:
    class Rotary(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", torch.ones(2, dtype=torch.float64))

        def forward(self) -> torch.Tensor:
            return self.inv_freq.float()

    module = Rotary()
    with _Widen(module):
        assert module().dtype == torch.float32
        assert module.inv_freq.float().dtype == torch.float64
        assert module.inv_freq.to(torch.float32).dtype == torch.float64
        assert torch.softmax(module.inv_freq, -1, dtype=torch.float32).dtype == torch.float64


def test_the_least_fp64_number_fits_a_tensor_made_without_a_type() -> None:
    """XGLM masks with it."""
    with _Widen(torch.nn.Linear(1, 1)):
        made = torch.full((), torch.finfo(torch.float64).min)
        named = torch.full(size=(2,), fill_value=torch.finfo(torch.float64).min)
        mixed = torch.full((2,), fill_value=torch.finfo(torch.float64).min)
        counted = torch.full((2,), 3)
    for each in (made, named, mixed):
        assert each.dtype == torch.float64
        assert (each == torch.finfo(torch.float64).min).all()
    assert counted.dtype == torch.int64


def test_the_callers_model_keeps_its_dtype_and_attention(model) -> None:
    before = model.config._attn_implementation
    TorchSession(model, CAPACITY, "fp64").step(np.full((1, 3), 5))
    TorchSession(model, CAPACITY, "bf16").step(np.full((1, 3), 5))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == before


def test_low_precision_logits_come_out_as_fp32(model) -> None:
    assert TorchSession(model, CAPACITY, "bf16").step(np.full((1, 3), 5)).logits.dtype == np.float32
    assert TorchSession(model, CAPACITY, "fp64").step(np.full((1, 3), 5)).logits.dtype == np.float64


def test_a_session_without_a_spec_says_so(model) -> None:
    with refused("E-RUN-SPEC"):
        _ = TorchSession(model, CAPACITY).spec


def test_a_hybrid_that_numbers_the_tokens_of_every_call_from_zero_is_told_their_places(tmp_path) -> None:
    """transformers' Bamba, called without position_ids, rotates a decoded token as the first: `generate` gives them.

    A reference that did not would call a right export wrong by 2e-4 and more; this is all there is to its decode.
    """
    from gqa_models.shrink import write_small
    from transformers import AutoModelForCausalLM

    from gqa_export.checkpoint.cache_argument import cache_argument
    from gqa_export.trace.states.torch_cache import empty_cache

    hybrid = AutoModelForCausalLM.from_pretrained(write_small("bamba", tmp_path)).eval().double()
    ids = torch.randint(4, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    cache = empty_cache(hybrid.config)
    with torch.no_grad():
        whole = hybrid(ids).logits[0, -1].numpy()
        for piece in (ids[:, :-1], ids[:, -1:]):
            without = hybrid(piece, use_cache=True, **{cache_argument(hybrid): cache}).logits[0, -1].numpy()
    session = TorchSession(hybrid, 32, "fp64")
    session.step(ids[:, :-1].numpy())
    told = session.step(ids[:, -1:].numpy()).logits[0, -1]
    # angles are fp32 in the model, and steps are in another order than the scan of the whole
    assert np.abs(told - whole).max() < 1e-4
    assert np.abs(without - whole).max() > 1e-2
