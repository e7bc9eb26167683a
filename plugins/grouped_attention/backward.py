"""Gradients of the op by formula, in plain PyTorch: attention is recomputed, a block of rows at a time.

Dimensions as in `gqa_export.attention_op`. With P the weights, t the capped scores and O the output of a row:
dV = P'dO, dP = dO V', dt = P (dP - O.dO), ds = dt (1 - (t/c)^2), dq = scale ds K, dK = scale ds'q, and a sink's
gradient is -P_sink (O.dO). A rotation's gradient is the rotation by the opposite angle.
"""

from __future__ import annotations

import torch
from gqa_plugins.grouped_attention import reference
from torch import Tensor

BLOCK_SCORES = 2**26  # elements of one block of scores, 256 MiB in fp32: memory grows with C, not with S * C


def gradients(grad_output: Tensor, grad_key: Tensor, grad_value: Tensor, query: Tensor, key: Tensor | None,
              value: Tensor | None, past_key: Tensor, past_value: Tensor, past_lengths: Tensor, new_lengths: Tensor,
              cos: Tensor | None, sin: Tensor | None, sinks: Tensor | None, *, num_heads: int, kv_num_heads: int,
              scale: float, softcap: float, window: int,
              interleaved: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of (query, key, value, past_key, past_value, sinks), each in its tensor's type; None for an absent one.

    grad_output [B, S, H*E], grad_key [B, K, C, D] and grad_value [B, K, C, E] belong to the op's three results.
    Computed in fp32, or fp64 if the inputs are. A sequence whose rows are NaN (it does not fit) gets none through them.
    """
    batch, steps, _ = query.shape
    size, value_size, capacity = past_key.shape[3], past_value.shape[3], past_key.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    past, new = past_lengths.long(), new_lengths.long()
    positions = past[:, None] + torch.arange(steps, device=query.device)
    table = None if cos is None or sin is None else (cos.to(wide), sin.to(wide))

    def turned(x: Tensor, heads: int, direction: int) -> Tensor:
        x_BSND = x.to(wide).reshape(batch, steps, heads, size)
        if table is None:
            return x_BSND
        return reference.rotate(x_BSND, table[0], direction * table[1], positions, interleaved)

    rotated = turned(query, num_heads, 1)
    present_key, present_value = past_key.to(wide), past_value.to(wide)
    if key is not None and value is not None:
        new_value = value.to(wide).reshape(batch, steps, kv_num_heads, value_size)
        present_key = reference.write_cache(present_key, turned(key, kv_num_heads, 1), past, new, False)
        present_value = reference.write_cache(present_value, new_value, past, new, False)

    # What does not fit gave NaN rows: for the gradient it is a sequence of nothing, whatever its cache holds.
    broken = (past + new > capacity) | (past < 0) | (new > steps)
    seen_past, seen_new = past.masked_fill(broken, 0), new.masked_fill(broken, 0)
    grad_rows = grad_output.to(wide).masked_fill(broken[:, None, None], 0)
    grad_query, grad_sinks = torch.zeros_like(rotated), grad_rows.new_zeros(num_heads)
    grad_key, grad_value = grad_key.to(wide).clone(), grad_value.to(wide).clone()
    block = max(1, BLOCK_SCORES // max(1, batch * num_heads * capacity))
    for first in range(0, steps, block):
        part = slice(first, first + block)
        grads = _block(rotated[:, part], present_key, present_value, seen_past, seen_new, sinks,
                       grad_rows[:, part], scale=scale, softcap=softcap, window=window, first_step=first)
        grad_query[:, part] = grads[0]
        grad_key += grads[1]
        grad_value += grads[2]
        grad_sinks += grads[3]

    of_key = of_value = None
    if key is not None and value is not None:
        new_key = _take_new(grad_key, past, new, steps)
        of_key = turned(new_key, kv_num_heads, -1).reshape(key.shape).to(key.dtype)
        of_value = _take_new(grad_value, past, new, steps).reshape(value.shape).to(value.dtype)
    of_query = turned(grad_query, num_heads, -1).reshape(query.shape).to(query.dtype)
    return (of_query, of_key, of_value, grad_key.to(past_key.dtype), grad_value.to(past_value.dtype),
            None if sinks is None else grad_sinks.to(sinks.dtype))


def _block(query: Tensor, key: Tensor, value: Tensor, past: Tensor, new: Tensor, sinks: Tensor | None, grad: Tensor, *,
           scale: float, softcap: float, window: int, first_step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (rotated query rows, present_key, present_value, sinks) through one block of rows."""
    rows = reference.row_weights(query, key, value, past, new, sinks, scale=scale, softcap=softcap, window=window,
                                 first_step=first_step)
    batch, steps, kv_heads, group, _ = rows.queries_BSKGD.shape
    # A row past new_lengths is a constant zero, whatever comes back for it.
    valid = first_step + torch.arange(steps, device=new.device) < new[:, None]
    grad_BSKGE = grad.masked_fill(~valid[..., None], 0).reshape(batch, steps, kv_heads, group, -1)
    grad_values = torch.einsum("bkgst,bskge->bkte", rows.weights_BKGST, grad_BSKGE)
    grad_weights = torch.einsum("bskge,bkte->bkgst", grad_BSKGE, rows.values_BKTE)
    shared = (rows.weights_BKGST * grad_weights).sum(-1)
    grad_scores = rows.weights_BKGST * (grad_weights - shared[..., None])
    if softcap:
        grad_scores = grad_scores * (1 - (rows.capped_BKGST / softcap) ** 2)
    grad_query = torch.einsum("bkgst,bktd->bskgd", grad_scores, rows.keys_BKTD) * scale
    grad_keys = torch.einsum("bkgst,bskgd->bktd", grad_scores, rows.queries_BSKGD) * scale
    grad_sinks = -(rows.sink_weights_BKGS * shared).sum((0, 3)).reshape(-1)
    return grad_query.reshape(query.shape), grad_keys, grad_values, grad_sinks


def _take_new(grad_cache: Tensor, past: Tensor, new: Tensor, steps: int) -> Tensor:
    """Move the gradient of the tokens that were written out of the cache's, in place: [B, S, K, D]."""
    batch, heads, capacity, size = grad_cache.shape
    taken = grad_cache.new_zeros(batch, steps, heads, size)
    for b in range(batch):
        start = int(past[b])
        count = min(int(new[b]), steps, capacity - start)
        if start >= 0 and count > 0:
            taken[b, :count] = grad_cache[b, :, start: start + count].transpose(0, 1)
            grad_cache[b, :, start: start + count] = 0
    return taken
