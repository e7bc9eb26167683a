"""Attention modules whose `forward` writes the products and the softmax out, rewritten to call our attention.

Two shapes of module, each in several families: BERT's (`query`, `key`, `value`) and BART's (`q_proj`, `k_proj`,
`v_proj`, `out_proj`). Only self-attention is rewritten: as causal language models these decoders have no encoder.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import UnsupportedModel
from .. import attention_hook
from .registry import Patch, stored

WHY = "the module's forward writes attention out instead of calling the attention interface"


def _heads(module: Any, hidden_BSX: torch.Tensor, linear: Any, size: int) -> torch.Tensor:
    return linear(hidden_BSX).unflatten(-1, (-1, size)).transpose(1, 2)


def _refuse_encoder(module: Any, states: Any) -> None:
    if states is not None:
        raise UnsupportedModel("a layer attends to an encoder's states", type(module).__name__,
                               "only decoders that run alone can be exported", code="E-MODEL-CROSS-ATTENTION")


def _bert(_original: Any, _module: Any) -> Any:
    def forward(self: Any, hidden_states: Any, attention_mask: Any = None, *_: Any, encoder_hidden_states: Any = None,
                cache: Any = None, past_key_values: Any = None, **__: Any) -> tuple[torch.Tensor, None]:
        _refuse_encoder(self, encoder_hidden_states)
        size = self.attention_head_size
        query, key, value = (_heads(self, hidden_states, linear, size)
                             for linear in (self.query, self.key, self.value))
        key, value = stored(key, value, self.layer_idx, cache, past_key_values)
        output_BSHE = attention_hook.attention(self, query, key, value, attention_mask)[0]
        return output_BSHE.flatten(2), None

    return forward


def _bart(_original: Any, _module: Any) -> Any:
    def forward(self: Any, hidden_states: Any, key_value_states: Any = None, cache: Any = None,
                attention_mask: Any = None, attn_prompt: Any = None, past_key_values: Any = None,
                **_: Any) -> tuple[torch.Tensor, None]:
        _refuse_encoder(self, key_value_states)
        _refuse_encoder(self, attn_prompt)
        query, key, value = (_heads(self, hidden_states, linear, self.head_dim)
                             for linear in (self.q_proj, self.k_proj, self.v_proj))
        key, value = stored(key, value, self.layer_idx, cache, past_key_values)
        output_BSHE = attention_hook.attention(self, query, key, value, attention_mask, scaling=self.scaling)[0]
        return self.out_proj(output_BSHE.flatten(2)), None

    return forward


PATCHES = (
    *(Patch(module, f"{name}.forward", _bert, WHY) for module, name in (
        ("big_bird.modeling_big_bird", "BigBirdSelfAttention"),
        ("megatron_bert.modeling_megatron_bert", "MegatronBertSelfAttention"),
        ("rembert.modeling_rembert", "RemBertSelfAttention"))),
    *(Patch(module, f"{name}.forward", _bart, WHY) for module, name in (
        ("mvp.modeling_mvp", "MvpAttention"),
        ("trocr.modeling_trocr", "TrOCRAttention"),
        ("xglm.modeling_xglm", "XGLMAttention"))),
)
