"""The torch op `gqa::long_grouped_query_attention`: eager implementation and fake.

No trace records it: an export puts it in the place of `gqa::grouped_query_attention`, layer by layer. The eager
implementation is the plugin package's reference. Signature, order and attributes are those of
`gqa_export.long_attention_op`.
"""

from __future__ import annotations

import torch
from gqa_plugins.grouped_attention import long_reference
from torch import Tensor

from ..long_attention_op import METHODS

_HYPER = METHODS["hyper"]


@torch.library.custom_op("gqa::long_grouped_query_attention", mutates_args=())
def long_grouped_query_attention(
    query: Tensor, key: Tensor | None, value: Tensor | None, past_key: Tensor, past_value: Tensor,
    past_lengths: Tensor, new_lengths: Tensor, cos: Tensor | None, sin: Tensor | None, sinks: Tensor | None,
    fractions: Tensor, projections: Tensor, code_order: Tensor,
    num_heads: int, kv_num_heads: int, scale: float, softcap: float, window: int, rotary_interleaved: int,
    growing: int, method: int, leaf: int, heavy_keys: int, samples: int, anchors: int, tile: int, block: int,
    score_rows: int, exact_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op, functionally; see `long_attention_op` for shapes."""
    return long_reference.long_grouped_query_attention(
        query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin, sinks, fractions, projections,
        code_order, num_heads=num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap, window=window,
        rotary_interleaved=rotary_interleaved, growing=growing, method=method, leaf=leaf, heavy_keys=heavy_keys,
        samples=samples, anchors=anchors, tile=tile, block=block, score_rows=score_rows, exact_steps=exact_steps)


@long_grouped_query_attention.register_fake
def _fake(query: Tensor, key: Tensor | None, value: Tensor | None, past_key: Tensor, past_value: Tensor,
          past_lengths: Tensor, new_lengths: Tensor, cos: Tensor | None, sin: Tensor | None, sinks: Tensor | None,
          fractions: Tensor, projections: Tensor, code_order: Tensor, num_heads: int, kv_num_heads: int, scale: float,
          softcap: float, window: int, rotary_interleaved: int, growing: int, method: int, leaf: int, heavy_keys: int,
          samples: int, anchors: int, tile: int, block: int, score_rows: int, exact_steps: int,
          ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, new, _ = query.shape
    total = past_key.shape[2] + (new if growing and key is not None else 0)
    selected: int | torch.SymInt = 0
    approximate = not window and new > exact_steps
    if approximate and method == _HYPER:
        selected = total + num_heads // kv_num_heads * new
    elif approximate:  # how many leaves are touched depends on the lengths
        selected = torch.library.get_ctx().new_dynamic_size()
    return (query.new_empty(batch, new, num_heads * past_value.shape[-1]),
            past_key.new_empty(batch, kv_num_heads, total, past_key.shape[-1]),
            past_value.new_empty(batch, kv_num_heads, total, past_value.shape[-1]),
            fractions.new_empty(batch, kv_num_heads, selected))
