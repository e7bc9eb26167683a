"""Falcon with rotary embeddings: its attention module writes attention out. With ALiBi it is refused."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import InvalidCheckpoint, UnsupportedModel
from .. import attention_hook
from .registry import Patch


def _make(_original: Any, module: Any) -> Any:
    def forward(self: Any, hidden_states: Any, alibi: Any, attention_mask: Any, position_ids: Any = None,
                layer_past: Any = None, use_cache: Any = False, output_attentions: Any = False,
                position_embeddings: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
        if alibi is not None:
            raise UnsupportedModel("attention adds a bias to its scores that depends on the distance (ALiBi)",
                                   f"layer {self.layer_idx}, {type(self).__name__}",
                                   "grouped-query attention cannot hold a position bias; this checkpoint is not "
                                   "supported", code="E-MODEL-ALIBI")
        kv_heads = self.num_heads if self.new_decoder_architecture else self.num_kv_heads
        parts_BSHD = self._split_heads(self.query_key_value(hidden_states))
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key, value = (part.reshape(shape).transpose(1, 2) for part in parts_BSHD)
        if key.shape[1] != kv_heads:
            raise InvalidCheckpoint(f"the projection gives {key.shape[1]} key/value heads, and the configuration has "
                                    f"{kv_heads}", f"layer {self.layer_idx}, {type(self).__name__}",
                                    "correct num_kv_heads, multi_query or new_decoder_architecture in config.json",
                                    code="E-MODEL-KV-HEADS")
        query, key = module.apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        output_BSHE = attention_hook.attention(self, query, key, value, attention_mask)[0]
        return self.dense(output_BSHE.flatten(2)), None

    return forward


PATCHES = (Patch("falcon.modeling_falcon", "FalconAttention.forward", _make,
                 "the module's forward writes attention out instead of calling the attention interface"),)
