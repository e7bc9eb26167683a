"""What in a model's own code a refusal is about: the statement that looks at values, the module that attends."""

from __future__ import annotations

import inspect
import traceback
from typing import Any

import torch

from ...errors import cause_of

CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params", "layer_past")
"""what a model's forward calls the cache that it is given"""
LONGEST = 90
"""characters of a statement that are shown"""


def statement(error: BaseException) -> str:
    """The innermost statement of a modelling file in an exception's trace, with its place; else what was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "modeling_" in frame.filename]
    if not frames:
        return cause_of(error)
    last = frames[-1]
    text = " ".join((last.line or "").split())
    return f"`{text[:LONGEST]}` in {last.name}, {last.filename.replace(chr(92), '/').rpartition('/')[2]}"


def own_attention(model: Any) -> str:
    """Which module attends instead, and whether the model keeps keys and values at all; "" if there is nothing to
    name. For the end of a sentence."""
    foreign = tuple(type(value) for value in vars(model.config).values() if hasattr(value, "model_type"))
    text = type(model.config.get_text_config(decoder=True))
    named = [module for module in model.modules() if "attention" in type(module).__name__.lower()
             and not (isinstance(own := getattr(module, "config", None), foreign) and type(own) is not text)]
    inner = next((module for module in named if not any(other in named for other in list(module.modules())[1:])), None)
    found = []
    if inner is not None:
        found.append(f"{type(inner).__name__} computes attention in the model's own code")
    if not _takes_cache(model):
        found.append("the model does not keep keys and values between steps (its forward does not take a cache of "
                     "them)")
    return f": {', and '.join(found)}" if found else ""


def _takes_cache(model: torch.nn.Module) -> bool:
    known = inspect.signature(model.forward).parameters
    return any(name in known for name in CACHE_ARGUMENTS)
