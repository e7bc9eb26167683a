"""The reference of `gqa::LongGroupedQueryAttention` in plain PyTorch, any dtype up to fp64.

Two forms of one function. `long_grouped_query_attention` reads only the keys that were selected, so that a whole prompt
costs what it should. `log_weights` writes down, for every row and every key before it, the logarithm of the weight with
which the key counts (0: as it is, -inf: not at all): the definition, quadratic, that tests and reports use.

Dimensions as in `gqa_export.long_attention_op`. Source: HyperAttention, Han et al. 2023 (arXiv:2310.05869), algorithms
1 (sortLSH), 3 and 4. On purpose unlike the paper: positions are absolute (a leaf is `leaf` positions, not a half of a
half of what happens to be there), rows are ranked within their leaf, samples are stratified and drawn from a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_export.long_attention_op import segments

from . import reference
from .long_selection import (
    HYPER,
    Leaf,
    Scores,
    Selection,
    Setting,
    Tables,
    buckets,
    leaves,
    packed,
    ranks,
    sample_indices,
    select,
    unpacked,
    voting_rows,
)


class RunningSoftmax:
    """A softmax that is given its keys part by part. Shapes [.., rows, E] and [.., rows, 1]."""

    def __init__(self, scores: Tensor, values: Tensor) -> None:
        self.top, self.total, self.sum = self._part(scores, values)

    @staticmethod
    def _part(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
        weights = torch.exp(scores - top)
        return top, weights.sum(-1, keepdim=True), weights @ values

    def add(self, scores: Tensor, values: Tensor, back: Tensor | None = None) -> None:
        """More keys. back: indices [.., rows] of the rows among those of `scores`, where they are in another order."""
        parts = self._part(scores, values)
        if back is not None:
            flat = [part.flatten(2, 3) for part in parts]
            parts = tuple(torch.gather(part, 2, back[..., None].expand(*back.shape, part.shape[-1]))  # type: ignore
                          for part in flat)
        top = torch.maximum(self.top, parts[0])
        old, new = torch.exp(self.top - top), torch.exp(parts[0] - top)
        self.top, self.total, self.sum = top, self.total * old + parts[1] * new, self.sum * old + parts[2] * new

    def mean(self, sinks: Tensor) -> Tensor:
        """The weighted mean of all values; sinks [.., 1, 1] are further scores without a value."""
        top = torch.maximum(self.top, sinks)
        old = torch.exp(self.top - top)
        return self.sum * old / (self.total * old + torch.exp(sinks - top))


def rows_of_hyper(query: Tensor, key: Tensor, value: Tensor, leaf: Leaf, setting: Setting, scores: Scores,
                  tables: Tables, selection: Selection) -> RunningSoftmax:
    """The rows of a leaf [K, G, rows, D], their own leaf and every segment before it."""
    assert selection.key_places is not None
    assert selection.query_places is not None
    running = own_leaf(query, key, value, leaf, setting, scores)
    _heads, _group, rows = query.shape[:3]
    order, rank = ranks(selection.query_places[:, :, leaf.step: leaf.step + rows])
    slots = torch.arange(setting.leaf)
    at_slot = order[..., ((slots * rows + setting.leaf - 1) // setting.leaf).clamp(max=rows - 1)]
    slot_of_row = rank * setting.leaf // rows
    spread = torch.gather(query, 2, at_slot[..., None].expand(*at_slot.shape, query.shape[-1]))
    for start, count in segments(leaf.number):
        low, width = start * setting.leaf, count * setting.leaf
        keys, values = key[:, low: low + width], value[:, low: low + width]
        bucket, size = buckets(leaf, rank, width, setting)
        key_order, key_rank = ranks(selection.key_places[:, low: low + width])
        anchor = (torch.arange(width) < setting.anchors) if low == 0 else torch.zeros(width, dtype=torch.bool)
        index = key_order[..., None]
        in_order = [torch.gather(x, 1, index.expand(*key_order.shape, x.shape[-1])).unflatten(1, (-1, size))[:, None]
                    for x in (keys, values)]
        heavy = scores.of(spread.unflatten(2, (width // size, -1)), in_order[0])
        heavy = heavy.masked_fill(anchor[key_order].unflatten(1, (-1, size))[:, None, :, None], -torch.inf)
        running.add(heavy, in_order[1], slot_of_row)
        index_Km, weight = sample_indices(tables, width)
        sampled = [torch.gather(x, 1, index_Km[..., None].expand(*index_Km.shape, x.shape[-1]))[:, None]
                   for x in (keys, values)]
        known = torch.gather(key_rank, 1, index_Km)[:, None, None] // size == bucket[..., None]
        known = known | anchor[index_Km][:, None, None]
        running.add((scores.of(query, sampled[0]) + weight).masked_fill(known, -torch.inf), sampled[1])
        if low == 0 and setting.anchors:
            running.add(scores.of(query, keys[:, None, : setting.anchors]), values[:, None, : setting.anchors])
    return running


def own_leaf(query: Tensor, key: Tensor, value: Tensor, leaf: Leaf, setting: Setting,
             scores: Scores) -> RunningSoftmax:
    """The rows of a leaf over the keys of that leaf, up to each row."""
    start = leaf.number * setting.leaf
    later = torch.arange(start, leaf.last) > torch.arange(leaf.first, leaf.last)[:, None]
    own = scores.of(query, key[:, None, start: leaf.last]).masked_fill(later, -torch.inf)
    return RunningSoftmax(own, value[:, None, start: leaf.last])


def rows_of_tiles(query: Tensor, key: Tensor, value: Tensor, leaf: Leaf, setting: Setting, scores: Scores,
                  tables: Tables, selection: Selection) -> RunningSoftmax:
    """The rows of a leaf [K, G, rows, D], their own leaf and, tile by tile, what the tile chose before it."""
    assert selection.tiles is not None
    running = own_leaf(query, key, value, leaf, setting, scores)
    width = leaf.number * setting.leaf
    if not width:
        return running
    index_Km, weight = sample_indices(tables, width)
    sampled = [torch.gather(x, 1, index_Km[..., None].expand(*index_Km.shape, x.shape[-1])) for x in (key, value)]
    parts = []
    for tile in range(setting.leaf // setting.tile):
        rows, _ = voting_rows(leaf, tile, setting)
        if not rows:
            continue
        chosen = selection.tiles[leaf.number, tile]
        chosen = chosen[:, chosen[0] >= 0]
        keys_KX = (chosen[..., None] * setting.block + torch.arange(setting.block)).flatten(1)
        heavy = [torch.gather(x, 1, keys_KX[..., None].expand(*keys_KX.shape, x.shape[-1])) for x in (key, value)]
        known = (index_Km[..., None] // setting.block == chosen[:, None]).any(-1)
        mine = query[:, :, rows.start: rows.stop]
        again = (scores.of(mine, sampled[0][:, None]) + weight).masked_fill(known[:, None, None], -torch.inf)
        both = torch.cat((scores.of(mine, heavy[0][:, None]), again), -1)
        parts.append((both, torch.cat((heavy[1], sampled[1]), 1)))
    part = [RunningSoftmax(both, values[:, None]) for both, values in parts]
    top, total, weighted = (torch.cat([getattr(each, name) for each in part], 2) for name in ("top", "total", "sum"))
    highest = torch.maximum(running.top, top)
    old, new = torch.exp(running.top - highest), torch.exp(top - highest)
    running.top, running.total = highest, running.total * old + total * new
    running.sum = running.sum * old + weighted * new
    return running


def log_weights(leaf: Leaf, total: int, setting: Setting, tables: Tables, selection: Selection, group: int) -> Tensor:
    """[K, G, rows, total]: the logarithm of the weight with which each key counts for each row of a leaf."""
    heads = tables.fractions.shape[0]
    weights = torch.full((heads, group, leaf.rows, total), -torch.inf, dtype=torch.float64)
    position = torch.arange(total)
    own = (position >= leaf.number * setting.leaf) & (position <= torch.arange(leaf.first, leaf.last)[:, None])
    weights.masked_fill_(own, 0.0)
    spans = segments(leaf.number) if setting.method == HYPER else [(0, leaf.number)] if leaf.number else []
    for start, count in spans:
        low, width = start * setting.leaf, count * setting.leaf
        index_Km, weight = sample_indices(tables, width)
        times = torch.stack([torch.bincount(row, minlength=width) for row in index_Km])
        part = (times.double().log() + weight)[:, None, None].expand(heads, group, leaf.rows, width).clone()
        if setting.method == HYPER:
            assert selection.key_places is not None
            assert selection.query_places is not None
            rank = ranks(selection.query_places[:, :, leaf.step: leaf.step + leaf.rows])[1]
            bucket, size = buckets(leaf, rank, width, setting)
            key_rank = ranks(selection.key_places[:, low: low + width])[1]
            part.masked_fill_(bucket[..., None] == (key_rank // size)[:, None, None], 0.0)
            if low == 0:
                part[..., : setting.anchors] = 0.0
        else:
            assert selection.tiles is not None
            for tile in range(setting.leaf // setting.tile):
                rows, _ = voting_rows(leaf, tile, setting)
                for head in range(heads if rows else 0):
                    for block in selection.tiles[leaf.number, tile][head].tolist():
                        if block >= 0:
                            keys = slice(block * setting.block, (block + 1) * setting.block)
                            part[head, :, rows.start: rows.stop, keys] = 0.0
        weights[..., low: low + width] = part
    return weights


def long_grouped_query_attention(
    query: Tensor, key: Tensor | None, value: Tensor | None, past_key: Tensor, past_value: Tensor,
    past_lengths: Tensor, new_lengths: Tensor, cos: Tensor | None, sin: Tensor | None, sinks: Tensor | None,
    fractions: Tensor, projections: Tensor, code_order: Tensor, *,
    num_heads: int, kv_num_heads: int, scale: float, softcap: float, window: int, rotary_interleaved: int,
    growing: int, method: int, leaf: int, heavy_keys: int, samples: int, anchors: int, tile: int, block: int,
    score_rows: int, exact_steps: int, handed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op, functionally.

    A layer with a window, and a call of at most `exact_steps` new tokens, are exact. What is unspecified in the cache
    or in padded rows, even NaN, reaches no output and no selection.

    Args:
        handed: a selection [B, K, N] to compute with, in place of this function's own.

    Returns:
        output [B, S, H*E], present_key [B, K, T, D], present_value [B, K, T, E], selection [B, K, N].
    """
    exact = reference.grouped_query_attention(
        query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin, sinks, num_heads=num_heads,
        kv_num_heads=kv_num_heads, scale=scale, softcap=softcap, window=window, rotary_interleaved=rotary_interleaved,
        growing=growing) if window or query.shape[1] <= exact_steps else None
    batch, new, _ = query.shape
    if exact is not None:
        return *exact, fractions.new_empty(batch, kv_num_heads, 0)
    setting = Setting(method, leaf, heavy_keys, samples, anchors, tile, block, score_rows, exact_steps)
    tables, scores = Tables(fractions, projections, code_order), Scores(scale, softcap)
    present_key, present_value = _present(query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin,
                                          kv_num_heads, rotary_interleaved, growing)
    size, group = past_key.shape[-1], num_heads // kv_num_heads
    queries = query.reshape(batch, new, num_heads, size)
    if cos is not None and sin is not None:
        queries = reference.rotate(queries, cos, sin, past_lengths[:, None] + torch.arange(new),
                                   bool(rotary_interleaved))
    acc = torch.float64 if query.dtype == torch.float64 else torch.float32
    queries = queries.to(acc).unflatten(2, (kv_num_heads, group)).permute(0, 2, 3, 1, 4)
    sink = (sinks.to(acc) if sinks is not None else torch.full((num_heads,), -torch.inf, dtype=acc)).reshape(
        kv_num_heads, group, 1, 1)
    output = query.new_zeros(batch, new, num_heads * past_value.shape[-1])
    chosen = []
    for b in range(batch):
        past, count = int(past_lengths[b]), int(new_lengths[b])
        total = past + count
        if past < 0 or count > new or total > present_key.shape[2]:
            output[b, : max(0, min(count, new))] = torch.nan
            past = count = total = 0
        rows = torch.arange(new) < count
        q = queries[b].masked_fill(~rows[:, None], 0)
        k, v = (x[b].to(acc).masked_fill((torch.arange(x.shape[2]) >= total)[:, None], 0)
                for x in (present_key, present_value))
        mine = (select(q, k, past, count, setting, scores, tables) if handed is None
                else unpacked(handed[b], past, count, new, present_key.shape[2], group, setting))
        chosen.append(packed(mine, past, count, setting, kv_num_heads))
        of_leaf = rows_of_hyper if method == HYPER else rows_of_tiles
        for each in leaves(past, count, leaf):
            steps = slice(each.step, each.step + each.rows)
            mean = of_leaf(q[:, :, steps], k, v, each, setting, scores, tables, mine).mean(sink)
            output[b, steps] = mean.permute(2, 0, 1, 3).flatten(1).to(output.dtype)
    return output, present_key, present_value, torch.nn.utils.rnn.pad_sequence(
        [each.permute(1, 0) for each in chosen], batch_first=True, padding_value=-1).permute(0, 2, 1)


def _present(query: Tensor, key: Tensor | None, value: Tensor | None, past_key: Tensor, past_value: Tensor,
             past_lengths: Tensor, new_lengths: Tensor, cos: Tensor | None, sin: Tensor | None, kv_num_heads: int,
             rotary_interleaved: int, growing: int) -> tuple[Tensor, Tensor]:
    """The cache with the new keys and values in it."""
    if key is None or value is None:
        return past_key.clone(), past_value.clone()
    batch, new, _ = query.shape
    keys = key.reshape(batch, new, kv_num_heads, -1)
    if cos is not None and sin is not None:
        keys = reference.rotate(keys, cos, sin, past_lengths[:, None] + torch.arange(new), bool(rotary_interleaved))
    values = value.reshape(batch, new, kv_num_heads, -1)
    return (reference.write_cache(past_key, keys, past_lengths.long(), new_lengths.long(), bool(growing)),
            reference.write_cache(past_value, values, past_lengths.long(), new_lengths.long(), bool(growing)))
