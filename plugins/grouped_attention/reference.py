"""The truth of `gqa::GroupedQueryAttention` in plain PyTorch, any dtype up to fp64.

Written for clarity, not speed: scores of all T cache positions are formed, masked, and normalised in fp32 (or
fp64 if the inputs are). Dimensions as in `gqa_export.contract`. Source: design of the op (contract version 1);
grouped-query attention is Ainslie et al., 2023 (arXiv:2305.13245).
"""

from __future__ import annotations

import torch


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


def write_cache(past_BKPD: torch.Tensor, new_BSKD: torch.Tensor, past_lengths_B: torch.Tensor,
                new_lengths_B: torch.Tensor, growing: bool) -> torch.Tensor:
    """Return the present cache: token t of sequence b at index t; positions at or past the capacity are dropped."""
    batch, heads, past, size = past_BKPD.shape
    present = past_BKPD.new_zeros(batch, heads, past + new_BSKD.shape[1] if growing else past, size)
    present[:, :, :past] = past_BKPD
    for b in range(batch):
        start = int(past_lengths_B[b])
        count = min(int(new_lengths_B[b]), present.shape[2] - start)
        if count > 0:
            present[b, :, start: start + count] = new_BSKD[b, :count].transpose(0, 1)
    return present


def grouped_query_attention(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None,
    past_key: torch.Tensor, past_value: torch.Tensor,
    past_lengths: torch.Tensor, new_lengths: torch.Tensor,
    cos: torch.Tensor | None = None, sin: torch.Tensor | None = None, sinks: torch.Tensor | None = None, *,
    num_heads: int, kv_num_heads: int, scale: float, softcap: float, window: int, rotary_interleaved: int,
    growing: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op, functionally: (output [B, S, H*E], present_key [B, K, T, D], present_value [B, K, T, E]).

    Nothing is mutated. A row that sees nothing, and rows at or past new_lengths, are zero. A sequence whose
    past_lengths + new_lengths exceeds a static capacity gives NaN rows for that sequence; what is unspecified in
    the cache (even NaN) never reaches an output.
    """
    batch, new, _ = query.shape
    size, value_size = past_key.shape[-1], past_value.shape[-1]
    group = num_heads // kv_num_heads
    steps_S = torch.arange(new, device=query.device)
    past_lengths, new_lengths = past_lengths.long(), new_lengths.long()
    positions_BS = past_lengths[:, None] + steps_S
    query_BSHD = query.reshape(batch, new, num_heads, size)
    if cos is not None and sin is not None:
        query_BSHD = rotate(query_BSHD, cos, sin, positions_BS, bool(rotary_interleaved))
    if key is not None and value is not None:
        key_BSKD = key.reshape(batch, new, kv_num_heads, size)
        if cos is not None and sin is not None:
            key_BSKD = rotate(key_BSKD, cos, sin, positions_BS, bool(rotary_interleaved))
        value_BSKE = value.reshape(batch, new, kv_num_heads, value_size)
        present_key = write_cache(past_key, key_BSKD, past_lengths, new_lengths, bool(growing))
        present_value = write_cache(past_value, value_BSKE, past_lengths, new_lengths, bool(growing))
    else:
        present_key, present_value = past_key.clone(), past_value.clone()

    capacity = present_key.shape[2]
    total_B = past_lengths + new_lengths
    cache_T = torch.arange(capacity, device=query.device)
    valid_BT = cache_T < total_B[:, None]
    acc = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = present_key.to(acc).masked_fill(~valid_BT[:, None, :, None], 0)
    values = present_value.to(acc).masked_fill(~valid_BT[:, None, :, None], 0)
    queries = query_BSHD.to(acc).reshape(batch, new, kv_num_heads, group, size)
    scores_BKGST = torch.einsum("bskgd,bktd->bkgst", queries, keys) * scale
    if softcap:
        scores_BKGST = softcap * torch.tanh(scores_BKGST / softcap)
    visible_BST = (cache_T <= positions_BS[..., None]) & valid_BT[:, None]
    if window:
        visible_BST &= cache_T > positions_BS[..., None] - window
    visible_BST &= (steps_S < new_lengths[:, None])[..., None]
    scores_BKGST = scores_BKGST.masked_fill(~visible_BST[:, None, None], float("-inf"))
    sink_KG = (torch.full((num_heads,), float("-inf"), dtype=acc, device=query.device) if sinks is None
               else sinks.to(acc)).reshape(kv_num_heads, group)
    sink = sink_KG[None, :, :, None, None].expand(*scores_BKGST.shape[:4], 1)
    top = torch.maximum(scores_BKGST.amax(-1, keepdim=True) if capacity else sink, sink)
    top = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    weights = torch.exp(scores_BKGST - top)
    total = weights.sum(-1, keepdim=True) + torch.exp(sink - top)
    weights = weights / torch.where(total == 0, torch.ones_like(total), total)
    output = torch.einsum("bkgst,bkte->bskge", weights, values).reshape(batch, new, num_heads * value_size)
    overflow_B = total_B > capacity
    valid_row_BS = steps_S < new_lengths[:, None]
    output = torch.where((overflow_B[:, None] & valid_row_BS)[..., None], output.new_full((), float("nan")), output)
    return output.to(query.dtype), present_key, present_value
