"""The kernel functions of transformers, in terms of two ops: linear attention and the causal convolution.

A function is known by its kernel's name, never by a model. Inside `caught` the marked functions of a model's modules
(`checkpoint.state_kernels`) are replaced by those of `KERNELS`; one with another name is refused when it is called.
Dimensions: B batch, S new tokens, H heads, P value size, N key size (of state-space layers), G groups, C channels.
Sources: the reference implementations in transformers (`modeling_qwen3_next`, `modeling_kimi_linear`,
`modeling_mamba2`, `modeling_mamba`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.state_kernels import state_kernels
from ...errors import UnsupportedModel
from ..attention_hook import WITHOUT_EFFECT
from .stand_in_cache import Convolution, Recurrence, StandInCache, current

NOT_KNOWN = "this model's layers need more than the state ops of gqa-export; it is not supported"
SPEED_ONLY = frozenset({"chunk_size", "use_mambapy", "use_associative_scan"})
"""arguments that decide how something is computed, not what"""
MASK = "create_recurrent_attention_mask"
"""the function of transformers that makes the padding mask of state layers: it looks at values, and lengths do its
work"""


def causal_conv(kernel: str, cache: StandInCache, hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None,
                activation: str | None = None, **others: Any) -> Tensor:
    """[B, C, S] of inputs [B, C, S] and a weight [C, K]: each output sees the K - 1 inputs before its own."""
    _check_words(kernel, others)
    place = cache.convolution(hidden_states)
    if place is None:
        raise UnsupportedModel("a convolution over tokens does not keep its inputs in the cache", f"kernel {kernel}",
                               NOT_KNOWN, code="E-MODEL-STATE-PATH")
    inside = activation in (None, "silu", "swish")
    name = "silu" if activation and inside else ""
    y = cache.recorder.convolve(Convolution(*place, kernel, hidden_states, weight, bias, name))
    if inside:
        return y
    from transformers.activations import ACT2FN

    return ACT2FN[activation](y)


def delta_rule(kernel: str, cache: StandInCache, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
               initial_state: Tensor | None = None, output_final_state: bool = False,
               use_qk_l2norm_in_kernel: bool = False, **others: Any) -> tuple[Tensor, Tensor]:
    """The gated delta rule: g, the logarithm of the decay, is [B, S, H], or [B, S, H, N] in Kimi's delta attention."""
    _check_words(kernel, {**others, "initial_state": initial_state})
    layer, index = _place(kernel, cache)
    unit = _unit_length if use_qk_l2norm_in_kernel else torch.Tensor.float
    output, state = cache.recorder.recur(Recurrence(
        layer, index, kernel, unit(query), unit(key), value.float(), g.float(), beta.float(), "gated_delta",
        float(query.shape[-1]) ** -0.5))
    cache.returns(state, layer, index)
    return output.to(query.dtype), state


def chunk_scan(kernel: str, cache: StandInCache, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
               chunk_size: int = 0, D: Tensor | None = None, dt_bias: Tensor | None = None,
               initial_states: Tensor | None = None, dt_softplus: bool = False,
               dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False,
               **others: Any) -> Any:
    """Mamba-2: hidden_states [B, S, H, P], dt [B, S, H], A [H], B and C [B, S, G, N]; decay exp(dt * A), key B, value
    dt * x, query C. transformers limits dt everywhere but in a step of one token."""
    _check_words(kernel, {**others, "initial_states": initial_states})
    layer, index = _place(kernel, cache)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = torch.nn.functional.softplus(dt)
    low, high = dt_limit
    if (low > 0 if dt_softplus else low > -float("inf")) or high < float("inf"):
        limited, alone_B = torch.clamp(dt, min=low, max=high), cache.recorder.steps_alone()
        dt = limited if alone_B is None else torch.where(alone_B[:, None, None], dt, limited)
    x, dt = hidden_states.float(), dt.float()
    output, state = cache.recorder.recur(Recurrence(
        layer, index, kernel, C.float(), B.float(), x * dt[..., None], dt * A.float(), None, "gated", 1.0))
    if D is not None:
        output = output + D[..., None].float() * x
    cache.returns(state, layer, index)
    return (output, state) if return_final_states else output


def selective_scan(kernel: str, cache: StandInCache, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor,
                   C: Tensor, D: Tensor | None = None, z: Tensor | None = None, delta_bias: Tensor | None = None,
                   delta_softplus: bool = False, return_last_state: bool = False, **others: Any) -> Any:
    """Mamba: hidden_states, dt and z [B, C, S], A [C, N], B and C [B, N, S]; each channel is a head of value size 1
    that decays by key, exp(dt * A)."""
    _check_words(kernel, others)
    layer, index = _place(kernel, cache)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = torch.nn.functional.softplus(dt)
    dt_BSC, x_BSC = dt.float().transpose(1, 2), hidden_states.float().transpose(1, 2)
    output_BSC1, state = cache.recorder.recur(Recurrence(
        layer, index, kernel, C.float().transpose(1, 2)[:, :, None], B.float().transpose(1, 2)[:, :, None],
        (dt_BSC * x_BSC)[..., None], dt_BSC[..., None] * A.float(), None, "gated", 1.0))
    output = output_BSC1[..., 0].transpose(1, 2).to(hidden_states.dtype)
    if D is not None:
        output = output + hidden_states * D[:, None]
    if z is not None:
        output = output * torch.nn.functional.silu(z)
    cache.returns(state, layer, index)
    return (output, state) if return_last_state else output


KERNELS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv,
    "chunk_gated_delta_rule": delta_rule,
    "fused_recurrent_gated_delta_rule": delta_rule,
    "chunk_kda": delta_rule,
    "fused_recurrent_kda": delta_rule,
    "mamba_chunk_scan_combined": chunk_scan,
    "selective_scan_fn": selective_scan,
}
"""kernel name -> what stands in for it"""

AS_CACHED: dict[str, Callable[[Tensor], Tensor]] = {
    "mamba_chunk_scan_combined": lambda state: state.transpose(-1, -2),
    "selective_scan_fn": lambda state: state[..., None],
}
"""kernel name -> from the recurrent state as transformers' cache has it to the op's [.., heads, key, value], where that
is another order"""
STARTS_FROM_NOTHING = frozenset({"selective_scan_fn"})
"""kernels of which transformers' reference takes no state for several tokens at once: it has to be fed one by one"""


@contextmanager
def caught(modules: Iterable[str]) -> Iterator[None]:
    """Inside, the kernel functions of these modelling modules are those of `KERNELS`.

    Args:
        modules: dotted names; those that are not imported are left out.
    """
    undo: list[tuple[Any, str, Any]] = []
    try:
        for module in (sys.modules[name] for name in modules if name in sys.modules):
            found = dict(state_kernels(module.__name__))
            for name, kernel in found.items():
                undo.append((module, name, getattr(module, name)))
                setattr(module, name, _stand_in(kernel, getattr(module, name)))
            if found and hasattr(module, MASK):
                undo.append((module, MASK, getattr(module, MASK)))
                setattr(module, MASK, _mask(getattr(module, MASK)))
        yield
    finally:
        for module, name, original in reversed(undo):
            setattr(module, name, original)


def _stand_in(kernel: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **named: Any) -> Any:
        cache = current()
        if cache is None:
            return original(*args, **named)
        if kernel not in KERNELS:
            raise UnsupportedModel(f"a layer calls the kernel function `{kernel}`, which gqa-export does not know",
                                   original.__module__, NOT_KNOWN, code="E-MODEL-STATE-KERNEL")
        return KERNELS[kernel](kernel, cache, *args, **named)

    return call


def _mask(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def no_mask(*_: Any, **__: Any) -> None:
        """Lengths say which tokens are padding, and the ops heed them."""

    return no_mask


def _unit_length(x: Tensor) -> Tensor:
    """The last axis made a unit vector, in fp32; the small number is that of the reference."""
    x = x.float()
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _place(kernel: str, cache: StandInCache) -> tuple[int, int]:
    shared = cache.shares()
    place = cache.recurrence()
    if place is None and shared:
        raise UnsupportedModel("several recurrences of a layer share one state of the cache, each a part of it",
                               f"kernel {kernel}", NOT_KNOWN, code="E-MODEL-STATE-PATH")
    if place is None:
        raise UnsupportedModel("a recurrence runs without a state from the cache", f"kernel {kernel}", NOT_KNOWN,
                               code="E-MODEL-STATE-PATH")
    return place


def _check_words(kernel: str, others: dict[str, Any]) -> None:
    for name, given in others.items():
        if name in WITHOUT_EFFECT or name in SPEED_ONLY or given is None or given is False:
            continue
        raise UnsupportedModel(f"the kernel function `{kernel}` is called with `{name}`, which gqa-export does not "
                               "know", f"kernel {kernel}", NOT_KNOWN, code="E-MODEL-STATE-ARGUMENT")
