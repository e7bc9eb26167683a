"""RoFormer: interleaved rotary embedding from a sinusoidal table that is cut by the cache object's length."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import UnsupportedModel
from .. import attention_hook
from .registry import Patch, stored


def _positions(_original: Any, _module: Any) -> Any:
    def forward(self: Any, *_: Any, **__: Any) -> torch.Tensor:
        return torch.nn.functional.embedding(attention_hook.positions(), self.weight)  # [B, S, D]

    return forward


def _attention(_original: Any, _module: Any) -> Any:
    def forward(self: Any, hidden_states: Any, attention_mask: Any = None, sinusoidal_pos: Any = None,
                encoder_hidden_states: Any = None, cache: Any = None, past_key_values: Any = None,
                **_: Any) -> tuple[torch.Tensor, None]:
        if encoder_hidden_states is not None:
            raise UnsupportedModel("a layer attends to an encoder's states", type(self).__name__,
                                   "only decoders that run alone can be exported", code="E-MODEL-CROSS-ATTENTION")
        query, key, value = (linear(hidden_states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
                             for linear in (self.query, self.key, self.value))
        table_B1SD = sinusoidal_pos[0].transpose(0, 1)  # the model put two axes before [B, S, D]
        rotated = self.apply_rotary_position_embeddings(table_B1SD, query, key,
                                                        *([value] if self.rotary_value else []))
        query, key, value = rotated if self.rotary_value else (*rotated, value)
        key, value = stored(key, value, self.layer_idx, cache, past_key_values)
        output_BSHE = attention_hook.attention(self, query, key, value, attention_mask)[0]
        return output_BSHE.flatten(2), None

    return forward


PATCHES = (
    Patch("roformer.modeling_roformer", "RoFormerSinusoidalPositionalEmbedding.forward", _positions,
          "positions are counted from the cache object's length, which is one number for all rows of a batch"),
    Patch("roformer.modeling_roformer", "RoFormerSelfAttention.forward", _attention,
          "the module's forward writes attention out instead of calling the attention interface"),
)
