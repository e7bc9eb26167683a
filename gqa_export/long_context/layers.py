"""One layer of the exact model, approximated from its own inputs: error, mass, and the parameters of HyperAttention's
theorem, which nobody prints: how far the attention matrix is from what the proof supposes.
"""

from __future__ import annotations

import time

import torch
from gqa_plugins.grouped_attention import long_reference, long_selection

from ..compare.long_quality import LayerQuality
from ..long_attention_op import LongSetting
from ..spec import AttentionSpec
from .attention import approximate, exact, exact_scores, tables

FIRST_KEYS = 4
MOST_ROWS = 128
"""rows of the last leaf whose weights are looked at key by key"""


class LayerWatch:
    """Measures every layer of `layers` as an exact run passes it; see `attention.Watch`."""

    def __init__(self, setting: LongSetting, seed: int, layers: frozenset[int]) -> None:
        self.setting, self.seed, self.layers = setting, seed, layers
        self.found: dict[int, LayerQuality] = {}

    def __call__(self, spec: AttentionSpec, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 sinks: torch.Tensor | None) -> None:
        """Measure one layer: query [K, G, S, D], key [K, S, D], value [K, S, E]."""
        if spec.layer not in self.layers:
            return
        started = time.perf_counter()
        wanted = exact(spec, query, key, value, sinks)
        between = time.perf_counter()
        got = approximate(spec, self.setting, self.seed, query, key, value, sinks)
        seconds = time.perf_counter() - between
        behind = slice(self.setting.leaf, None)
        size = wanted[:, :, behind].norm(dim=-1).clamp(min=torch.finfo(wanted.dtype).tiny)
        error = ((got - wanted)[:, :, behind].norm(dim=-1) / size).flatten()
        alpha, column, rest = alphas(spec, query, key, sinks)
        mass, log_kappa = selected(spec, self.setting, self.seed, query, key, sinks)
        self.found[spec.layer] = LayerQuality(
            spec.layer, float(error.median()), float(torch.quantile(error[:: -(-len(error) // 1_000_000)], 0.99)), mass,
            alpha, column, rest, log_kappa, seconds, between - started)


def alphas(spec: AttentionSpec, query: torch.Tensor, key: torch.Tensor,
           sinks: torch.Tensor | None) -> tuple[float, int, float]:
    """The largest squared column norm of any head's attention matrix, times the number of tokens; its column; and the
    largest without the first keys."""
    tokens = query.shape[2]
    norms = query.new_zeros(*query.shape[:2], tokens)
    for scores in exact_scores(spec, query, key, sinks):
        weights = torch.softmax(scores, -1)[..., :-1]
        norms[..., : weights.shape[-1]] += weights.square().sum(2)
    best = norms.amax((0, 1))
    return tokens * float(best.max()), int(best.argmax()), tokens * float(best[FIRST_KEYS:].max())


def selected(spec: AttentionSpec, setting: LongSetting, seed: int, query: torch.Tensor, key: torch.Tensor,
             sinks: torch.Tensor | None) -> tuple[float, float]:
    """Of rows of the last leaf: the share of attention weights on keys that are read as they are; and the logarithm of
    the ratio between the largest and the smallest row sum of the others."""
    own, scores = long_selection.Setting(**setting.attributes()), long_selection.Scores(spec.scale, spec.softcap)
    known, tokens = tables(spec, setting, seed), query.shape[2]
    selection = long_selection.select(query, key, 0, tokens, own, scores, known)
    leaf = list(long_selection.leaves(0, tokens, setting.leaf))[-1]
    rows = torch.arange(0, leaf.rows, -(-leaf.rows // MOST_ROWS))
    read = long_reference.log_weights(leaf, tokens, own, known, selection, query.shape[1])[:, :, rows] == 0
    positions = leaf.first + rows
    found = scores.of(query[:, :, positions], key[:, None])
    found = found.masked_fill(torch.arange(tokens) > positions[:, None], -torch.inf)
    sink = query.new_full((spec.num_heads,), -torch.inf) if sinks is None else sinks.to(query.dtype)
    column = sink.reshape(spec.kv_num_heads, -1, 1, 1).expand(*found.shape[:3], 1)
    weights = torch.softmax(torch.cat((found, column), -1), -1)[..., :-1]
    left = torch.logsumexp(found.masked_fill(read, -torch.inf), -1)
    left = left[torch.isfinite(left)]
    share = (weights * read).sum(-1) / weights.sum(-1).clamp(min=1e-30)
    return float(share.mean()), float(left.max() - left.min()) if len(left) else 0.0
