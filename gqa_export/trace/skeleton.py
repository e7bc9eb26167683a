"""The model without its weights: on the meta device for probing, with untouched memory for tracing.

A trace reads no weight, so none is loaded: parameters are allocated and never written (their pages are never
mapped), buffers such as rotary frequencies are computed by the model's own constructor.
"""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Iterator
from typing import Any

import torch

from ..checkpoint.building import building
from ..checkpoint.tied_weights import tied as tied
from ..environment.stand_ins import CONVERSIONS


def build(config: Any, dtype: torch.dtype, *, device: str = "cpu", attention: str = "eager") -> torch.nn.Module:
    """The causal LM of a transformers config, uninitialised, in eval mode.

    Args:
        config: a transformers configuration; it is copied.
        dtype: of the parameters (those that transformers keeps in fp32 excepted).
        device: "meta" for a model without memory.
        attention: transformers' name of the attention implementation.

    Raises:
        UnsupportedModel: transformers cannot build it: a package is missing, or the configuration contradicts itself.
    """
    import transformers.initialization as initialization
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    kwargs: dict[str, Any] = {"attn_implementation": attention, "dtype": dtype}
    with initialization.no_init_weights(), torch.device(device), building(config):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **kwargs)
    model.tie_weights()
    _keep_in_fp32(model, dtype)
    if has_experts(model):
        model.set_experts_implementation("batched_mm")
    return model.eval()


def _keep_in_fp32(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """The parameters that transformers loads in fp32 whatever the dtype (norms of GPT-OSS in fp16, a router's bias)."""
    patterns = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]  # type: ignore[operator]
    if not patterns:
        return
    kept = re.compile("|".join(patterns))
    for name, parameter in model.named_parameters():
        if kept.search(name) and parameter.dtype == dtype:
            parameter.data = torch.empty_like(parameter, dtype=torch.float32)


def has_experts(model: torch.nn.Module) -> bool:
    """Whether transformers' experts interface is in use (its default implementation cannot be traced)."""
    return bool(getattr(model, "_can_set_experts_implementation", lambda: False)())


def converts(model: torch.nn.Module) -> bool:
    """Whether transformers renames, merges or splits tensors of a checkpoint when it loads this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    if CONVERSIONS.applies() and named_in_no_conversion(model):
        return False
    return bool(get_model_conversion_mapping(model, add_legacy=False))  # type: ignore[arg-type]


def named_in_no_conversion(model: torch.nn.Module) -> bool:
    """Whether no model inside this one can have an entry in transformers' table of conversions, whose keys are classes
    and types of models. All of them are constants of the function that builds it, and compiles a thousand regular
    expressions for it."""
    from transformers import PreTrainedModel, conversion_mapping

    if conversion_mapping._checkpoint_conversion_mapping_cache is not None:
        return False  # built by now, or changed by somebody
    known = {*conversion_mapping._MODEL_TO_CONVERSION_PATTERN,
             *strings_of(conversion_mapping._build_checkpoint_conversion_mapping.__code__)}
    inside = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return not known & {name for part in inside for name in (type(part).__name__, part.config.model_type)}


def strings_of(code: types.CodeType) -> Iterator[str]:
    """The string constants of some code, also those inside tuples and of the functions in it."""
    waiting: list[Any] = [code]
    while waiting:
        constant = waiting.pop()
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            waiting.extend(constant.co_consts)
        elif isinstance(constant, tuple | frozenset):
            waiting.extend(constant)
