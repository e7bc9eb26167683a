"""Llama 4: rotary embedding in complex numbers; temperatures by the length of the cache, here by each row's own.

transformers counts the tokens of a cache for all rows alike, so that in a batch of rows of several lengths only the
longest has the temperatures that it has alone. Here every row has its own.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import attention_hook
from .deepseek_v2 import WHY, angles, rotated
from .registry import Patch, stored


def _rotate(_original: Any, _module: Any) -> Any:
    def apply_rotary_emb(xq: Any, xk: Any, freqs_cis: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = freqs_cis[:, :, None, :, 0], freqs_cis[:, :, None, :, 1]
        return rotated(xq, cos, sin), rotated(xk, cos, sin)

    return apply_rotary_emb


def _attend(_original: Any, module: Any) -> Any:
    def forward(self: Any, hidden_states: Any, position_embeddings: Any, attention_mask: Any, cache: Any = None,
                past_key_values: Any = None, **others: Any) -> tuple[Any, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.use_rope:
            query, key = module.apply_rotary_emb(query, key, position_embeddings)
        if hasattr(self, "qk_norm"):
            query, key = self.qk_norm(query), self.qk_norm(key)
        if self.attn_temperature_tuning and not self.use_rope:
            chunks_BS11 = torch.floor((attention_hook.positions()[:, :, None, None].float() + 1.0) / self.floor_scale)
            query = (query * (torch.log1p(chunks_BS11) * self.attn_scale + 1.0)).to(query.dtype)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        key, value = stored(key, value, self.layer_idx, cache, past_key_values)
        output, _ = attention_hook.attention(self, query, key, value, attention_mask, scaling=self.scaling, **others)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), None

    return forward


PATCHES = (
    Patch("llama4.modeling_llama4", "Llama4TextRotaryEmbedding.forward", angles, WHY),
    Patch("llama4.modeling_llama4", "apply_rotary_emb", _rotate, WHY),
    Patch("llama4.modeling_llama4", "Llama4TextAttention.forward", _attend,
          "temperatures are made from the length of the cache"),
)
