"""X-MOD: one adapter a language, chosen by the rows' language ids, which are those of the configuration's default.

A decoder gets token ids alone, so every row has the default language: its adapter is applied, and no other.
"""

from __future__ import annotations

from typing import Any

from .registry import Patch


def _default(original: Any, _module: Any) -> Any:
    def forward(self: Any, hidden_states: Any, lang_ids: Any, *inputs: Any, **others: Any) -> Any:
        return original(self, hidden_states, self.config.default_language, *inputs, **others)

    return forward


def _chosen(_original: Any, _module: Any) -> Any:
    def lang_adapter(self: Any, lang_ids: Any, hidden_states: Any) -> Any:
        plain = hidden_states
        if self.adapter_layer_norm is not None:
            hidden_states = self.adapter_layer_norm(hidden_states)
        elif self.adapter_reuse_layer_norm:
            hidden_states = self.LayerNorm(hidden_states)
        residual = hidden_states if self.ln_before_adapter else plain
        return self.adapter_modules[str(lang_ids)](hidden_states) + residual

    return lang_adapter


WHY = "tokens are sorted by language, which is the same for all of them"
PATCHES = (
    Patch("xmod.modeling_xmod", "XmodEncoder.forward", _default, WHY),
    Patch("xmod.modeling_xmod", "XmodOutput.lang_adapter", _chosen, WHY),
)
