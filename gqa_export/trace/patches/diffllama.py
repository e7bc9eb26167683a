"""DiffLlama: two attention calls a layer, with the same scores and different values, as one with wider values.

What both give is put side by side by the model anyway, so the values are put side by side before: a cache of K heads
whose values are twice as wide as their keys. Source: Ye et al., Differential Transformer, arXiv 2410.05258.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import attention_hook
from .registry import Patch, stored


def _make(_original: Any, module: Any) -> Any:
    def forward(self: Any, hidden_states: Any, position_embeddings: Any, attention_mask: Any = None,
                cache: Any = None, past_key_values: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
        query, key, value = (linear(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                             for linear in (self.q_proj, self.k_proj, self.v_proj))
        query, key = module.apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = stored(key, value, self.layer_idx, cache, past_key_values)
        both = torch.cat([half.repeat(1, 2, 1, 1) for half in value.chunk(2, dim=1)], dim=-1)
        output_BSHE = attention_hook.attention(self, query, key, both, attention_mask, scaling=self.scaling)[0]
        first, second = output_BSHE.chunk(2, dim=2)
        one, two = (torch.exp((q * k).sum(-1, dtype=torch.float32)).to(query.dtype)
                    for q, k in ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2)))
        difference = self.groupnorm(first - (one - two + self.lambda_init) * second)
        return self.o_proj(((1 - self.lambda_init) * difference).flatten(2)), None

    return forward


PATCHES = (Patch("diffllama.modeling_diffllama", "DiffLlamaAttention.forward", _make,
                 "a layer calls attention twice, on the same queries and keys"),)
