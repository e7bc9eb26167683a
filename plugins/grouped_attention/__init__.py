"""Grouped-query attention over a KV cache: reference, kernels, plugin. Importing this imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gqa_plugins.grouped_attention.api import attend, grouped_query_attention

__all__ = ["attend", "grouped_query_attention"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from gqa_plugins.grouped_attention import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
