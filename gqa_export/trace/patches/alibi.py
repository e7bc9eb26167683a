"""ALiBi (Bloom, MPT): a head adds slope * position of the key to its scores. Rewritten with two more features.

The softmax does not see what is the same for all keys of a row, so "slope * distance" and "slope * position of the
key" are one thing. The position is a number that the key carries in its own cache row, the slope one that the query
carries: the scores' product adds them up, and the op stays as it is. A position is split into two digits of base 256,
each of which bf16 and fp16 hold exactly. Source: Press et al., arXiv 2108.12409.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import attention_hook
from .registry import Patch, stored

BASE = 256
WHY = "a bias that grows with the key's position is added to the scores (ALiBi)"


def carried(query: torch.Tensor, key: torch.Tensor, slopes_H: torch.Tensor,
            scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, H, S, D] and key [B, H, S, D] with two more features each, whose product is slope * position of the
    key / scale: what is left once the scores are multiplied by `scale`."""
    positions_B1S1 = attention_hook.positions()[:, None, :, None]
    high = torch.div(positions_B1S1, BASE, rounding_mode="floor")
    digits = torch.cat([high, positions_B1S1 - high * BASE], dim=-1).to(key.dtype)
    weights_H2 = torch.stack([slopes_H * (BASE / scale), slopes_H / scale], dim=-1)
    weights = weights_H2[None, :, None, :].to(query.dtype).expand(query.shape[0], -1, query.shape[2], -1)
    return torch.cat([query, weights], -1), torch.cat([key, digits.expand(-1, key.shape[1], -1, -1)], -1)


def _bloom(_original: Any, module: Any) -> Any:
    def forward(self: Any, hidden_states: Any, residual: Any, alibi: Any, attention_mask: Any, layer_past: Any = None,
                use_cache: Any = False, output_attentions: Any = False, **_: Any) -> tuple[torch.Tensor, None]:
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            layer_past.update(key, value, self.layer_idx)
        slopes_H = module._get_alibi_slopes(self.num_heads, hidden_states.device)
        query, key = carried(query, key, slopes_H, self.inv_norm_factor)
        output_BSHE = attention_hook.attention(self, query, key, value, attention_mask, scaling=self.inv_norm_factor)[0]
        return self.dense(output_BSHE.flatten(2)) + residual, None

    return forward


def _mpt(_original: Any, module: Any) -> Any:
    def forward(self: Any, hidden_states: Any, position_bias: Any, cache: Any = None, attention_mask: Any = None,
                past_key_values: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
        stored(key, value, self.layer_idx, cache, past_key_values)
        # the bias of the last key but one, seen from the last
        slopes_H = -module.build_mpt_alibi_tensor(self.n_heads, 2, device=hidden_states.device)[:, 0, 0]
        query, key = carried(query, key, slopes_H, self.softmax_scale)
        output_BSHE = attention_hook.attention(self, query, key, value, attention_mask, scaling=self.softmax_scale)[0]
        return self.out_proj(output_BSHE.flatten(2)), None

    return forward


PATCHES = (
    Patch("bloom.modeling_bloom", "BloomAttention.forward", _bloom, WHY),
    Patch("mpt.modeling_mpt", "MptAttention.forward", _mpt, WHY),
)
