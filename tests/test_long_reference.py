"""The reference of `gqa::LongGroupedQueryAttention`: its definition, exactness, unbiased sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gqa_plugins.grouped_attention import long_reference, long_selection, reference

from gqa_export import long_attention_op as contract
from gqa_export.long_attention_op import LongSetting

K, G, D, E = 2, 3, 16, 8
SMALL = {"hyper": LongSetting("hyper", leaf=64, heavy_keys=16, samples=16, anchors=3, exact_steps=2),
         "tiles": LongSetting("tiles", leaf=64, heavy_keys=16, samples=16, anchors=3, tile=16, block=8, score_rows=4,
                              exact_steps=2)}
METHODS = tuple(SMALL)


def tables(setting: LongSetting, seed: int = 0, layer: int = 0) -> dict[str, torch.Tensor]:
    return {"fractions": torch.tensor(contract.fractions(seed, layer, K, setting.samples)),
            "projections": torch.tensor(contract.projections(seed, layer, D)),
            "code_order": torch.tensor(contract.code_order())}


def tensors(batch: int, new: int, past: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {"query": 1.5 * normal(batch, new, K * G * D), "key": normal(batch, new, K * D),
            "value": normal(batch, new, K * E),
            "past_key": normal(batch, K, past, D), "past_value": normal(batch, K, past, E),
            "past_lengths": torch.full((batch,), past), "new_lengths": torch.full((batch,), new)}


def attributes(**other: Any) -> dict[str, Any]:
    return {"num_heads": K * G, "kv_num_heads": K, "scale": D**-0.5, "softcap": 0.0, "window": 0,
            "rotary_interleaved": 0, "growing": 1, **other}


def run(given: dict[str, torch.Tensor], setting: LongSetting, seed: int = 0, sinks: torch.Tensor | None = None,
        handed: torch.Tensor | None = None, **other: Any) -> tuple[torch.Tensor, ...]:
    return long_reference.long_grouped_query_attention(
        **given, cos=None, sin=None, sinks=sinks, **tables(setting, seed), **attributes(**other),
        **setting.attributes(), handed=handed)


def exact(given: dict[str, torch.Tensor], sinks: torch.Tensor | None = None, **other: Any) -> torch.Tensor:
    return reference.grouped_query_attention(**given, sinks=sinks, **attributes(**other))[0]


def by_definition(given: dict[str, torch.Tensor], setting: LongSetting, softcap: float = 0.0,
                  sinks: torch.Tensor | None = None) -> torch.Tensor:
    """The op of one sequence without a past, from the log-weights of every key."""
    new = given["query"].shape[1]
    q = given["query"][0].reshape(new, K, G, D).permute(1, 2, 0, 3)
    k, v = (given[name][0].reshape(new, K, -1).transpose(0, 1) for name in ("key", "value"))
    own, scores = long_selection.Setting(**setting.attributes()), long_selection.Scores(D**-0.5, softcap)
    known = long_selection.Tables(**tables(setting))
    selection = long_selection.select(q, k, 0, new, own, scores, known)
    rows = torch.cat([long_reference.log_weights(leaf, new, own, known, selection, G)
                      for leaf in long_selection.leaves(0, new, setting.leaf)], 2)
    logits = scores.of(q, k[:, None]) + rows
    sink = torch.full((K, G, new, 1), -torch.inf) if sinks is None else sinks.reshape(K, G, 1, 1).expand(K, G, new, 1)
    weights = torch.softmax(torch.cat((logits, sink), -1), -1)[..., :-1]
    return (weights @ v[:, None]).permute(2, 0, 1, 3).reshape(1, new, K * G * E)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("new", [64, 65, 200, 320, 449])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(0.0, False), (3.0, True)])
def test_sparse_form_equals_the_definition(method: str, new: int, softcap: float, with_sinks: bool) -> None:
    given, sinks = tensors(1, new), torch.linspace(-2, 2, K * G, dtype=torch.float64) if with_sinks else None
    ours = run(given, SMALL[method], softcap=softcap, sinks=sinks)[0]
    wanted = by_definition(given, SMALL[method], softcap, sinks)
    assert (ours - wanted).abs().max() <= 1e-12
    if new > 128:
        assert (ours - exact(given, softcap=softcap, sinks=sinks)).abs().max() > 1e-3, "nothing was approximated"


@pytest.mark.parametrize("setting", [
    replace(SMALL["hyper"], leaf=512), replace(SMALL["tiles"], leaf=512),
    replace(SMALL["hyper"], heavy_keys=256), replace(SMALL["tiles"], heavy_keys=512),
    replace(SMALL["hyper"], samples=256), replace(SMALL["tiles"], samples=512),
    replace(SMALL["hyper"], samples=300, anchors=0)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_reading_every_key_is_exact_attention(setting: LongSetting, dtype: torch.dtype, bound: float) -> None:
    wide = tensors(1, 450)
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in wide.items()}
    ours, same_dtype = run(given, setting)[0], exact(given)
    assert (ours - same_dtype).abs().max() <= bound * max(1, same_dtype.abs().max())


@pytest.mark.parametrize("part", ["denominator", "numerator"])
def test_sums_over_sampled_keys_are_unbiased(part: str) -> None:
    """Over 4,000 seeds the mean of what is drawn is the sum that it stands for, spikes included."""
    keys, samples, seeds = 300, 16, 4000
    generator = torch.Generator().manual_seed(1)
    spiky = torch.exp(2.0 * torch.randn(keys, generator=generator, dtype=torch.float64))
    if part == "numerator":
        spiky *= 1 + torch.rand(keys, generator=generator, dtype=torch.float64)
    found = torch.zeros(seeds, dtype=torch.float64)
    for seed in range(seeds):
        known = long_selection.Tables(torch.tensor(contract.fractions(seed, 0, 1, samples)), torch.empty(0),
                                      torch.empty(0))
        index, weight = long_selection.sample_indices(known, keys)
        found[seed] = spiky[index[0]].sum() * torch.tensor(weight, dtype=torch.float64).exp()
    error = found.std() / seeds**0.5
    assert abs(found.mean() - spiky.sum()) <= 3 * error
    assert error < 0.03 * spiky.sum(), "this many seeds could not tell"


@pytest.mark.parametrize("method", METHODS)
def test_rows_ignore_padding_neighbours_and_capacity(method: str) -> None:
    setting, alone = SMALL[method], tensors(1, 300)
    wanted = run(alone, setting)[0]
    given = tensors(3, 340, seed=5)
    for name in ("query", "key", "value"):
        given[name][1, :300], given[name][1, 300:] = alone[name][0], torch.nan
    given["new_lengths"] = torch.tensor([340, 300, 0])
    given.update(past_key=torch.full((3, K, 777, D), torch.nan, dtype=torch.float64),
                 past_value=torch.full((3, K, 777, E), torch.nan, dtype=torch.float64))
    ours = run(given, setting, growing=0)[0]
    assert (ours[1, :300] - wanted[0]).abs().max() <= 1e-12
    assert (ours[1, 300:] == 0).all()
    assert (ours[2] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_rows_ignore_tokens_behind_their_leaf(method: str) -> None:
    long = tensors(1, 449)
    short = {**long, **{name: long[name][:, :320] for name in ("query", "key", "value")},
             "new_lengths": torch.tensor([320])}
    assert (run(short, SMALL[method])[0] - run(long, SMALL[method])[0][:, :320]).abs().max() <= 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_chunks_that_end_at_leaf_borders_change_nothing(method: str) -> None:
    whole = tensors(1, 330)
    wanted = run(whole, SMALL[method])[0]
    past_key, past_value, at, parts = whole["past_key"], whole["past_value"], 0, []
    for end in (128, 192, 330):
        chunk = {**{name: whole[name][:, at:end] for name in ("query", "key", "value")}, "past_key": past_key,
                 "past_value": past_value, "past_lengths": torch.tensor([at]), "new_lengths": torch.tensor([end - at])}
        output, past_key, past_value, _ = run(chunk, SMALL[method])
        parts.append(output)
        at = end
    assert (torch.cat(parts, 1) - wanted).abs().max() <= 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_decode_steps_and_layers_with_windows_are_exact(method: str) -> None:
    given = tensors(2, 2, past=300)
    assert torch.equal(run(given, SMALL[method])[0], exact(given))
    given = tensors(1, 200)
    assert torch.equal(run(given, SMALL[method], window=100)[0], exact(given, window=100))


@pytest.mark.parametrize("method", METHODS)
def test_a_selection_that_is_handed_over_decides(method: str) -> None:
    given = tensors(2, 300)
    given["new_lengths"] = torch.tensor([300, 170])
    output, _, _, selection = run(given, SMALL[method])
    assert torch.equal(run(given, SMALL[method], handed=selection)[0], output)
    other = run(tensors(2, 300, seed=3), SMALL[method])[3]
    assert (run(given, SMALL[method], handed=other)[0] - output).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(method: str) -> None:
    given = tensors(1, 300)
    assert torch.equal(run(given, SMALL[method], seed=1)[0], run(given, SMALL[method], seed=1)[0])
    assert not torch.equal(run(given, SMALL[method], seed=1)[0], run(given, SMALL[method], seed=2)[0])


@pytest.mark.parametrize("method", METHODS)
def test_the_first_keys_always_count_in_full(method: str) -> None:
    setting, known = SMALL[method], long_selection.Tables(**tables(SMALL[method]))
    own = long_selection.Setting(**setting.attributes())
    given = tensors(1, 256)
    q = given["query"][0].reshape(256, K, G, D).permute(1, 2, 0, 3)
    k = given["key"][0].reshape(256, K, D).transpose(0, 1)
    selection = long_selection.select(q, k, 0, 256, own, long_selection.Scores(D**-0.5, 0.0), known)
    for leaf in long_selection.leaves(0, 256, setting.leaf):
        if leaf.number:
            weights = long_reference.log_weights(leaf, 256, own, known, selection, G)
            assert (weights[..., : setting.anchors] == 0).all()
