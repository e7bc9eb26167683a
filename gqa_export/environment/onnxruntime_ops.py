"""Which fused operators for states of fixed size the installed onnxruntime runs."""

from __future__ import annotations

import functools

from .packages import installed_version

SINCE = {"com.microsoft::LinearAttention": (1, 26), "com.microsoft::CausalConvWithState": (1, 26),
         "ai.onnx::LinearAttention": (1, 32)}
"""operator -> the first version of onnxruntime that runs it in fp32. Source: the kernels that the CPU provider of 1.26
to 1.32 registers, and the sources of the CUDA provider; 1.28 to 1.31 know ai.onnx::LinearAttention and refuse models of
its opset, 27"""
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")


@functools.cache
def state_ops_of_runtime(provider: str) -> frozenset[str] | None:
    """The operators of `SINCE` that the installed onnxruntime has for a provider.

    The contributed ones are looked up among the kernels that it registers, where it tells them (the CPU's; those of
    CUDA are in a library that may not be loadable here).

    Args:
        provider: "cpu" or "cuda".

    Returns:
        Their names; None where onnxruntime is not installed.
    """
    version = next((version for name in DISTRIBUTIONS if (version := installed_version(name))), "")
    if not version:
        return None
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    found = {name for name, since in SINCE.items() if numbers >= since}
    if provider == "cpu":
        registered = registered_on_cpu()
        if registered is not None:
            found = {name for name in found if not name.startswith("com.microsoft::") or name in registered}
    return frozenset(found)


def registered_on_cpu() -> frozenset[str] | None:
    """The operators of `SINCE` for which the CPU provider registers an fp32 kernel; None where it does not tell."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as binding

        kernels = binding.get_all_opkernel_def()
    except (ImportError, AttributeError):
        return None
    names = {f"{kernel.domain or 'ai.onnx'}::{kernel.op_name}" for kernel in kernels
             if kernel.provider == "CPUExecutionProvider" and "tensor(float)" in kernel.type_constraints.get("T", ())}
    return frozenset(names & SINCE.keys())
