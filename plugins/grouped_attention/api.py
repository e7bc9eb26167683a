"""The public entry: grouped-query attention over a static KV cache, from PyTorch.

Tensors as in `gqa_export.attention_op`. On CUDA through Triton; on a CPU through Triton's interpreter
(TRITON_INTERPRET=1 before the first import); anywhere, slowly, in plain PyTorch with backend="reference". """

from __future__ import annotations

import torch
from gqa_plugins.grouped_attention import ops, plan, validate

from gqa_export.errors import GqaExportError

BACKENDS = ("triton", "reference")


def choose_backend(device: torch.device, backend: str | None) -> str:
    """The backend's name, or a refusal that says what would work on this device. Never a silent substitute."""
    if backend is not None and backend not in BACKENDS:
        raise GqaExportError(f"backend {backend!r} is unknown", where="grouped_query_attention, argument backend",
                             fix=f"use one of {', '.join(map(repr, BACKENDS))}, or None", code="E-OPTION-BACKEND")
    if backend != "reference" and device.type != "cuda" and not plan.interpreting():
        raise GqaExportError(f"query is on {device}, where the Triton kernels do not run",
                             where="grouped_query_attention, argument query",
                             fix='move it to CUDA, pass backend="reference", or set TRITON_INTERPRET=1 (slow)',
                             code="E-ENV-NO-GPU")
    return backend or "triton"


def grouped_query_attention(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, past_key: torch.Tensor,
    past_value: torch.Tensor, past_lengths: torch.Tensor, *, num_heads: int, kv_num_heads: int, scale: float,
    softcap: float = 0.0, window: int = 0, new_lengths: torch.Tensor | None = None, cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None, sinks: torch.Tensor | None = None, rotary_interleaved: bool = False,
    max_length: int | None = None, backend: str | None = None, ring: bool = False, key_scale: float | None = None,
    value_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend with S new tokens per sequence to the static cache, which is updated in place.

    query [B, S, H*D]; key [B, S, K*D] and value [B, S, K*E], or both None for a layer that reads another layer's
    cache; past_key [B, K, C, D], past_value [B, K, C, E], contiguous; past_lengths [B] int32, tokens in the cache;
    new_lengths [B] int32, valid new tokens (absent: S); cos and sin [M, R/2]: rotate queries and new keys here;
    sinks [H]: one more logit per head in the denominator; window: tokens visible including the current one, 0 = all.
    ring: the caches are rings of C slots, token t in slot t mod C; a sequence may be longer than C, but brings at most
    C - window + 1 new tokens.
    key_scale, value_scale: the caches are int8 and hold codes, a cached key being its code times key_scale; new tokens
    are attended as they are stored. No code says that a number is a NaN or an infinity: from the first new token on
    whose key or value has one, a head's rows are NaN in this call.
    max_length: the host's bound on past + new; given, nothing is read from the device. Absent: the capacity C, and
    lengths are read once for the capacity check, except while a CUDA graph is captured or the call is compiled: then
    a sequence that does not fit gives NaN rows.

    Returns (output [B, S, H*E], past_key, past_value), the caches being the tensors that were passed. Rows at or past
    new_lengths, and rows that see nothing, are zero. With gradients wanted, use `attend`, the functional form.
    Raises GqaExportError, naming the argument, before anything is launched.
    """
    name = choose_backend(query.device, backend)
    sizes = validate.check(query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin, sinks,
                           num_heads=num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap, window=window,
                           max_length=max_length, reference=name == "reference", ring=ring, key_scale=key_scale,
                           value_scale=value_scale)
    wanted = [t for t in (query, key, value, past_key, past_value, sinks) if t is not None and t.requires_grad]
    if wanted and torch.is_grad_enabled():
        raise GqaExportError("a gradient is wanted through a cache that is written in place",
                             where="grouped_query_attention",
                             fix="call it under torch.no_grad(), or use gqa_plugins.grouped_attention.attend",
                             code="E-RUN-GRADIENT")
    _check_lengths_where_possible(past_lengths, new_lengths, sizes, cos, max_length, window if ring else 0)
    output = ops.attend_in_place(query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin, sinks,
                                 num_heads, kv_num_heads, scale, softcap, window, rotary_interleaved,
                                 sizes.C if max_length is None else min(max_length, sizes.C), name, ring,
                                 key_scale or 0.0, value_scale or 0.0)
    return output, past_key, past_value


def attend(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, past_key: torch.Tensor,
    past_value: torch.Tensor, past_lengths: torch.Tensor, *, num_heads: int, kv_num_heads: int, scale: float,
    softcap: float = 0.0, window: int = 0, new_lengths: torch.Tensor | None = None, cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None, sinks: torch.Tensor | None = None, rotary_interleaved: bool = False,
    max_length: int | None = None, backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same without mutation: returns (output, present_key, present_value), new tensors, differentiable.

    For training. Arguments as in `grouped_query_attention`. Gradients flow from all three results to query, key, value,
    past_key, past_value and sinks (not to cos and sin); the backward pass recomputes attention in plain PyTorch, a
    block of rows at a time.
    """
    name = choose_backend(query.device, backend)
    sizes = validate.check(query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin, sinks,
                           num_heads=num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap, window=window,
                           max_length=max_length, reference=name == "reference")
    _check_lengths_where_possible(past_lengths, new_lengths, sizes, cos, max_length)
    return ops.attend(query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin, sinks,
                      num_heads, kv_num_heads, scale, softcap, window, rotary_interleaved,
                      sizes.C if max_length is None else max_length, name)


def _check_lengths_where_possible(past_lengths: torch.Tensor, new_lengths: torch.Tensor | None,
                                  sizes: validate.Dimensions, cos: torch.Tensor | None,
                                  max_length: int | None, ring_window: int = 0) -> None:
    if max_length is not None or torch.compiler.is_compiling():
        return
    if past_lengths.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    validate.check_lengths(past_lengths, new_lengths, sizes, cos, ring_window)
