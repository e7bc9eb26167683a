"""Attention classes looked up by implementation in a table of the model's own: ours is the eager one.

Where the class then reaches the attention interface, or a method that is patched, nothing else is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import attention_hook
from .registry import Patch

WHY = "the model picks its attention class from a table of its own, which knows built-in implementations only"


def _same_as_eager(table: str) -> Callable[[Any, Any], Any]:
    return lambda _original, module: getattr(module, table)["eager"]


PATCHES = tuple(Patch(module, f"{table}[{attention_hook.NAME}]", _same_as_eager(table), WHY) for module, table in (
    ("gptj.modeling_gptj", "GPTJ_ATTENTION_CLASSES"),
    ("gpt_neo.modeling_gpt_neo", "GPT_NEO_ATTENTION_CLASSES"),
    ("falcon.modeling_falcon", "FALCON_ATTENTION_CLASSES"),
    ("git.modeling_git", "GIT_SELF_ATTENTION_CLASSES"),
))
