"""The truth of `gqa::GroupedQueryAttention` in plain PyTorch, any dtype up to fp64.

Written for clarity, not speed: scores of all T cache positions are formed, masked, and normalised in fp32 (or
fp64 if the inputs are). Dimensions as in `gqa_export.attention_op`. Source: design of the op (contract versions 1, 2);
grouped-query attention is Ainslie et al., 2023 (arXiv:2305.13245).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gqa_plugins.grouped_attention.codes import CACHES, decode, encode, first_faults

from gqa_export.attention_op import CACHE_CODES, RING


def rotate(x_BSND: torch.Tensor, cos_MR: torch.Tensor, sin_MR: torch.Tensor, positions_BS: torch.Tensor,
           interleaved: bool) -> torch.Tensor:
    """Rotate the first R features of every head; cos and sin are [M, R/2], the rest passes unchanged."""
    half = cos_MR.shape[-1]
    rows_BS = positions_BS.clamp(0, cos_MR.shape[0] - 1)
    cos, sin = cos_MR[rows_BS].unsqueeze(2), sin_MR[rows_BS].unsqueeze(2)
    turned, rest = x_BSND[..., : 2 * half], x_BSND[..., 2 * half:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = turned[..., :half], turned[..., half:]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def write_ring(past_BKND: torch.Tensor, new_BSKD: torch.Tensor, past_lengths_B: torch.Tensor,
               new_lengths_B: torch.Tensor) -> torch.Tensor:
    """Return the present ring: token t of sequence b in slot t mod N. Of more than N new tokens the last N stay."""
    present, slots = past_BKND.clone(), past_BKND.shape[2]
    for b in range(len(past_BKND)):
        start, count = int(past_lengths_B[b]), min(int(new_lengths_B[b]), new_BSKD.shape[1])
        for step in range(max(0, count - slots), count if start >= 0 else 0):
            present[b, :, (start + step) % slots] = new_BSKD[b, step]
    return present


def ring_positions(slots: int, total_B: torch.Tensor) -> torch.Tensor:
    """[B, N]: the token that each slot of a ring holds after `total` tokens; negative where it never held one."""
    last_B1 = total_B[:, None] - 1
    return last_B1 - (last_B1 - torch.arange(slots, device=total_B.device)) % slots


def write_cache(past_BKPD: torch.Tensor, new_BSKD: torch.Tensor, past_lengths_B: torch.Tensor,
                new_lengths_B: torch.Tensor, growing: bool) -> torch.Tensor:
    """Return the present cache: token t of sequence b at index t; positions at or past the capacity are dropped."""
    batch, heads, past, size = past_BKPD.shape
    present = past_BKPD.new_zeros(batch, heads, past + new_BSKD.shape[1] if growing else past, size)
    present[:, :, :past] = past_BKPD
    for b in range(batch):
        start = int(past_lengths_B[b])
        count = min(int(new_lengths_B[b]), new_BSKD.shape[1], present.shape[2] - start)
        if start >= 0 and count > 0:
            present[b, :, start: start + count] = new_BSKD[b, :count].transpose(0, 1)
    return present


@dataclass(frozen=True)
class RowWeights:
    """Softmax weights of a block of rows and what they came from, all in the wide type; zero where nothing is seen."""

    queries_BSKGD: torch.Tensor
    keys_BKTD: torch.Tensor
    values_BKTE: torch.Tensor
    capped_BKGST: torch.Tensor  # scores after the soft cap, before the mask
    weights_BKGST: torch.Tensor
    sink_weights_BKGS: torch.Tensor


def row_weights(query_BSHD: torch.Tensor, key_BKTD: torch.Tensor, value_BKTE: torch.Tensor,
                past_lengths_B: torch.Tensor, new_lengths_B: torch.Tensor, sinks_H: torch.Tensor | None, *,
                scale: float, softcap: float, window: int, first_step: int = 0, ring: bool = False) -> RowWeights:
    """Weights of steps first_step .. first_step + S - 1 over caches that hold the new tokens. ring: the caches are.

    In fp32, or fp64 if the inputs are. What lies past the valid tokens, in the cache or in the query, is set to zero
    before it can meet a zero weight.
    """
    batch, new, heads, size = query_BSHD.shape
    kv_heads, capacity = key_BKTD.shape[1:3]
    group = heads // kv_heads
    steps_S = first_step + torch.arange(new, device=query_BSHD.device)
    positions_BS = past_lengths_B[:, None] + steps_S
    row_BS = steps_S < new_lengths_B[:, None]
    total_B = past_lengths_B + new_lengths_B
    cache_BT = (ring_positions(capacity, total_B) if ring
                else torch.arange(capacity, device=query_BSHD.device).expand(batch, capacity))
    valid_BT = (cache_BT >= 0) & (cache_BT < total_B[:, None])
    if ring:  # what no row sees, because it lies behind the first one's window, may be anything
        valid_BT &= cache_BT > past_lengths_B[:, None] - window
    acc = torch.float64 if query_BSHD.dtype == torch.float64 else torch.float32
    keys = key_BKTD.to(acc).masked_fill(~valid_BT[:, None, :, None], 0)
    values = value_BKTE.to(acc).masked_fill(~valid_BT[:, None, :, None], 0)
    queries = query_BSHD.to(acc).masked_fill(~row_BS[..., None, None], 0).reshape(batch, new, kv_heads, group, size)
    capped = torch.einsum("bskgd,bktd->bkgst", queries, keys) * scale
    if softcap:
        capped = softcap * torch.tanh(capped / softcap)
    visible_BST = (cache_BT[:, None] <= positions_BS[..., None]) & valid_BT[:, None]
    if window > 0:
        visible_BST &= cache_BT[:, None] > positions_BS[..., None] - window
    elif window < 0:  # chunks of -window positions
        visible_BST &= cache_BT[:, None] >= positions_BS[..., None] // -window * -window
    visible_BST &= row_BS[..., None]
    scores = capped.masked_fill(~visible_BST[:, None, None], float("-inf"))
    sink_KG = (torch.full((heads,), float("-inf"), dtype=acc, device=query_BSHD.device) if sinks_H is None
               else sinks_H.to(acc)).reshape(kv_heads, group)
    sink = sink_KG[None, :, :, None, None].expand(*scores.shape[:4], 1)
    top = torch.maximum(scores.amax(-1, keepdim=True) if capacity else sink, sink)
    top = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    weights, sink_weights = torch.exp(scores - top), torch.exp(sink - top)
    total = weights.sum(-1, keepdim=True) + sink_weights
    total = torch.where(total == 0, torch.ones_like(total), total)
    return RowWeights(queries, keys, values, capped, weights / total, (sink_weights / total).squeeze(-1))


def grouped_query_attention(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None,
    past_key: torch.Tensor, past_value: torch.Tensor,
    past_lengths: torch.Tensor, new_lengths: torch.Tensor,
    cos: torch.Tensor | None = None, sin: torch.Tensor | None = None, sinks: torch.Tensor | None = None, *,
    num_heads: int, kv_num_heads: int, scale: float, softcap: float, window: int, rotary_interleaved: int,
    growing: int, cache_codes: int = 0, key_scale: float = 1.0, value_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op, functionally: (output [B, S, H*E], present_key [B, K, T, D], present_value [B, K, T, E]).

    Nothing is mutated. A row that sees nothing, and rows at or past new_lengths, are zero. A sequence whose
    past_lengths + new_lengths exceeds a static capacity gives NaN rows for that sequence, as do lengths that cannot
    be (past_lengths below 0, new_lengths above S) and, in a ring, more new tokens than it has slots for; what is
    unspecified in the cache (even NaN) never reaches an output.

    cache_codes: the caches hold codes, and new tokens are attended as they are stored. A head's rows are NaN from the
    first new token on whose key or value is not finite.

    Raises:
        ValueError: a ring has fewer slots than its window, or no window; the caches are of another type than
            cache_codes says.
    """
    if cache_codes and CACHE_CODES.get(CACHES.get(past_key.dtype, "")) != cache_codes:
        raise ValueError(f"a cache of {past_key.dtype} holds no codes of kind {cache_codes}")
    batch, new, _ = query.shape
    ring, slots = growing == RING, past_key.shape[2]
    if ring and not 0 < window <= slots:
        raise ValueError(f"a ring of {slots} slots cannot hold a window of {window}")
    past_lengths, new_lengths = past_lengths.long(), new_lengths.long()
    steps_S = torch.arange(new, device=query.device)
    positions_BS = past_lengths[:, None] + steps_S
    query_BSHD = query.reshape(batch, new, num_heads, past_key.shape[-1])
    if cos is not None and sin is not None:
        query_BSHD = rotate(query_BSHD, cos, sin, positions_BS, bool(rotary_interleaved))
    if key is not None and value is not None:
        key_BSKD = key.reshape(batch, new, kv_num_heads, past_key.shape[-1])
        if cos is not None and sin is not None:
            key_BSKD = rotate(key_BSKD, cos, sin, positions_BS, bool(rotary_interleaved))
        value_BSKE = value.reshape(batch, new, kv_num_heads, past_value.shape[-1])
        if cache_codes:
            faults_BK = torch.minimum(first_faults(key_BSKD, new_lengths), first_faults(value_BSKE, new_lengths))
            key_BSKD = encode(key_BSKD, key_scale, past_key.dtype)
            value_BSKE = encode(value_BSKE, value_scale, past_value.dtype)
        if ring:
            present_key = write_ring(past_key, key_BSKD, past_lengths, new_lengths)
            present_value = write_ring(past_value, value_BSKE, past_lengths, new_lengths)
        else:
            present_key = write_cache(past_key, key_BSKD, past_lengths, new_lengths, bool(growing))
            present_value = write_cache(past_value, value_BSKE, past_lengths, new_lengths, bool(growing))
    else:
        present_key, present_value = past_key.clone(), past_value.clone()
    held_key, held_value = present_key, present_value
    if cache_codes:
        held_key, held_value = (decode(codes, step, query.dtype) for codes, step in
                                ((present_key, key_scale), (present_value, value_scale)))
    rows = row_weights(query_BSHD, held_key, held_value, past_lengths, new_lengths, sinks, scale=scale,
                       softcap=softcap, window=window, ring=ring)
    output_BSKGE = torch.einsum("bkgst,bkte->bskge", rows.weights_BKGST, rows.values_BKTE)
    if cache_codes and key is not None:
        faulty_BSK = (steps_S[:, None] >= faults_BK[:, None]) & (steps_S < new_lengths[:, None])[..., None]
        output_BSKGE = output_BSKGE.masked_fill(faulty_BSK[..., None, None], float("nan"))
    output = output_BSKGE.reshape(batch, new, -1)
    excess_B = new_lengths > slots - window + 1 if ring else past_lengths + new_lengths > present_key.shape[2]
    broken_B = excess_B | (past_lengths < 0) | (new_lengths > new)
    broken_BS = broken_B[:, None] & (steps_S < new_lengths[:, None])
    output = torch.where(broken_BS[..., None], output.new_full((), float("nan")), output)
    return output.to(query.dtype), present_key, present_value
