"""Which functions of a modelling module of transformers read and write the states of its layers. Standard library only.

transformers sends convolutions, linear attention and state-space scans through functions that a faster kernel may
replace, each marked with the name of that kernel: `@use_kernel_func_from_hub_with_fallback("chunk_kda", "fla")`. The
names are the same in all models; those of the functions are not. They are read from the module's source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

MARKED = re.compile(r'''^@use_kernel_func_from_hub_with_fallback\(\s*["'](\w+)["'][^)]*\)\s*\n'''
                    r"(?:@[^\n]*\n)*def (\w+)\(", re.MULTILINE)


@cache
def state_kernels(module: str) -> Mapping[str, str]:
    """The marked functions of a module: name of the function -> name of the kernel.

    Args:
        module: dotted name, `transformers.models.qwen3_next.modeling_qwen3_next`; it is not imported.

    Returns:
        Nothing where the module has none, or does not exist.
    """
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return MappingProxyType({})
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return MappingProxyType({})
    text = Path(spec.origin).read_text(encoding="utf-8")
    return MappingProxyType({function: kernel for kernel, function in MARKED.findall(text)})


def modelling_module(config: Any) -> str:
    """The dotted name of the module that has the models of a transformers configuration."""
    return type(config).__module__.replace(".configuration_", ".modeling_")


def keeps_states(config: Any) -> bool:
    """Whether the models of a configuration have functions that read and write states."""
    return bool(state_kernels(modelling_module(config)))
