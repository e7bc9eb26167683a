"""Attention written in a method of the model's own: `_attn(query, key, value, attention_mask)` -> our attention.

query, key [B, H, S, D], value [B, H, S, E], already rotated; the method returns the output in the same layout. What
each model scales by, and a window that only a buffer of it knows, are read from the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import attention_hook
from .registry import Patch

WHY = "the two products and the softmax are written out in the model's own method"


def _method(scale: Callable[[Any], float], window: Callable[[Any], int] = lambda module: 0) -> Callable[..., Any]:
    def make(_original: Any, _module: Any) -> Any:
        def _attn(self: Any, query: Any, key: Any, value: Any, attention_mask: Any = None) -> tuple[Any, None]:
            mask = attention_hook.windowed(attention_mask, window(self))
            layer = getattr(self, "layer_id", None)
            output_BSHE, _ = attention_hook.attention(self, query, key, value, mask, scaling=scale(self), layer=layer)
            return output_BSHE.transpose(1, 2), None

        return _attn

    return make


def _local_window(module: Any) -> int:
    """GPT-Neo cuts the window of its local layers out of a causal buffer, as wide as its configuration says."""
    return int(module.config.window_size) if module.attention_type == "local" else 0


PATCHES = (
    Patch("codegen.modeling_codegen", "CodeGenAttention._attn", _method(lambda m: 1.0 / float(m.scale_attn)), WHY),
    Patch("gptj.modeling_gptj", "GPTJAttention._attn", _method(lambda m: 1.0 / float(m.scale_attn)), WHY),
    Patch("gpt_neo.modeling_gpt_neo", "GPTNeoSelfAttention._attn", _method(lambda m: 1.0, _local_window), WHY),
    Patch("gpt_neox_japanese.modeling_gpt_neox_japanese", "GPTNeoXJapaneseAttention._attn",
          _method(lambda m: 1.0 / float(m.norm_factor)), WHY),
)
