"""Pooling and grouping as mathematics: what each method minimises, and that its maps commute with rotary."""

from __future__ import annotations

import itertools

import pytest
import torch

from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.conversion.convert import convert
from gqa_export.conversion.head_similarity import partition
from gqa_export.conversion.options import ConvertOptions
from gqa_export.conversion.pooling import pool_free, pool_pairs
from gqa_export.conversion.weight_error import knee


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def worst(folder, tmp_path, **options) -> float:
    name = "-".join(map(str, options.values()))
    result = convert(open_checkpoint(folder), tmp_path / name, ConvertOptions(**options))
    return sum(layer.output for layer in result.layers)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_oss", "phi3"])
def test_methods_come_in_their_order_of_error(name, tiny, tmp_path):
    """By weights: the best fit, the mean of turned heads, the mean, one head alone, noise."""
    folder = tiny(name)
    errors = [worst(folder, tmp_path, kv_heads="1", method=method, grouping=grouping)
              for method, grouping in (("svd", "contiguous"), ("mean", "similarity"), ("mean", "contiguous"),
                                       ("first", "contiguous"))]
    assert errors == sorted(errors)
    assert errors[-1] / errors[-2] > 1.3
    assert worst(folder, tmp_path, kv_heads="1", method="random") > errors[-2]


def test_pairs_are_fitted_as_well_as_a_complex_svd_can():
    rows = torch.complex(random(4, 3, 10), random(4, 3, 10))
    pooled, factors = pool_pairs(rows, None, None, True)
    for pair in range(3):
        singular = torch.linalg.svdvals(rows[:, pair])
        error = (rows[:, pair] - factors[:, pair, None] * pooled[pair]).norm()
        assert torch.isclose(error, singular[1:].norm(), rtol=1e-9)


def test_free_features_are_fitted_as_well_as_an_svd_can_under_metric_and_roots():
    rows, metric, roots = random(3, 4, 9), random(9, 9), random(3, 4, 4)
    pooled, maps = pool_free(rows, metric, roots, True)
    error = (roots @ (rows - maps @ pooled) @ metric).norm()
    singular = torch.linalg.svdvals((roots @ rows @ metric).reshape(12, 9))
    assert torch.isclose(error, singular[4:].norm(), rtol=1e-9)


def test_turned_copies_of_a_head_have_a_mean_without_error():
    head = random(4, 9)
    turns = torch.linalg.qr(random(3, 4, 4)).Q
    pooled, maps = pool_free(turns @ head, None, None, False)
    assert torch.allclose(maps @ pooled, turns @ head, atol=1e-9)
    row = torch.complex(random(2, 9), random(2, 9))
    phases = torch.polar(torch.ones(3, 2, dtype=torch.float64), random(3, 2))
    pooled, factors = pool_pairs(phases[..., None] * row, None, None, False)
    assert torch.allclose(factors[..., None] * pooled, phases[..., None] * row, atol=1e-9)
    assert torch.allclose(factors.abs(), torch.ones(3, 2, dtype=torch.float64))


def test_heads_turned_by_what_commutes_with_rotary_are_pooled_without_error(tiny, tmp_path, logits):
    """Two copies of each head, one turned in every rotary plane and in its values: nothing is lost."""
    from safetensors.torch import load_file, save_file

    from gqa_export.conversion.convert import expand

    folder = tiny("llama", num_hidden_layers=2)
    expand(open_checkpoint(folder), tmp_path / "mha", 4)
    tensors = load_file(tmp_path / "mha" / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn"
        angles = torch.rand(8, dtype=torch.float64)
        turn = torch.diag(torch.cat((angles.cos(), angles.cos())))
        turn[range(8, 16), range(8)], turn[range(8), range(8, 16)] = angles.sin(), -angles.sin()
        mix = torch.linalg.qr(random(16, 16)).Q
        for head in (1, 3):
            rows = slice(16 * head, 16 * head + 16)
            for role, left in (("q_proj", turn), ("k_proj", turn), ("v_proj", mix)):
                weight = tensors[f"{name}.{role}.weight"]
                weight[rows] = (left @ weight[rows].double()).float()
            weight = tensors[f"{name}.o_proj.weight"]
            weight[:, rows] = (weight[:, rows].double() @ mix.T).float()
    save_file(tensors, tmp_path / "mha" / "model.safetensors")
    expected = logits(folder)
    assert (logits(tmp_path / "mha") - expected).abs().max() < 1e-4  # the turned model computes the same in fp32
    for method in ("mean", "svd"):
        result = convert(open_checkpoint(tmp_path / "mha"), tmp_path / method,
                         ConvertOptions(kv_heads="2", method=method, grouping="similarity"))
        assert max(layer.output for layer in result.layers) < 1e-5
        assert (logits(tmp_path / method) - expected).abs().max() < 1e-4


def test_groups_are_the_best_of_all_for_few_heads():
    for seed in range(20):
        rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        alike = rows @ rows.T
        found = partition(alike, 3)
        assert sorted(head for group in found for head in group) == list(range(6))
        score = sum(float(alike[i, j]) for i, j in found)
        pairings = [((0, a), tuple(rest[:1] + [b]), tuple(x for x in rest[1:] if x != b))
                    for a in range(1, 6) for rest in [[x for x in range(1, 6) if x != a]] for b in rest[1:]]
        best = max(sum(float(alike[i, j]) for i, j in pairing) for pairing in pairings)
        assert score >= best - 0.35 * abs(best) - 1e-9
        swaps = itertools.combinations(found, 2)
        assert all(float(alike[a, b] + alike[c, d]) >= float(alike[a, c] + alike[b, d]) - 1e-9
                   for (a, b), (c, d) in swaps)


def test_the_knee_is_where_the_error_begins_to_rise():
    assert knee({8: 0.0, 4: 0.02, 2: 0.05, 1: 0.6}) == 2
    assert knee({8: 0.0, 4: 0.3, 2: 0.6, 1: 0.9}) is None
    assert knee({2: 0.0, 1: 0.9}) is None


def test_auto_takes_the_fewest_heads_within_the_limit(tiny, tmp_path):
    folder = tiny("llama_mha")
    curve = convert(open_checkpoint(folder), tmp_path / "a", ConvertOptions(kv_heads="2", method="svd"))
    two, one = curve.errors_by_kv_heads[2], curve.errors_by_kv_heads[1]
    assert two < one
    for limit, expected in ((one + 0.01, 1), ((one + two) / 2, 2)):
        result = convert(open_checkpoint(folder), tmp_path / f"auto{expected}",
                         ConvertOptions(kv_heads="auto", max_error=limit, method="svd"))
        assert set(result.kv_heads) == {expected}
