"""The torch ops under the public entry: `gqa_kernels::attend_in_place` and `gqa_kernels::attend`.

Two, because a custom op may not return an input that it mutates, nor have autograd when it mutates: the first is for
inference (mutates the caches, returns the output only), the second for training (mutates nothing, differentiable).
Both take checked arguments (`validate`); arguments as in `gqa_export.attention_op`, `bound` is the host's bound on
past + new. Triton is imported on the first launch.
"""

from __future__ import annotations

import torch
from gqa_plugins.grouped_attention import backward, plan, reference
from gqa_plugins.grouped_attention.codes import CACHES, Codes
from gqa_plugins.grouped_attention.validate import DTYPES
from torch import Tensor

from gqa_export.attention_op import CACHE_CODES, RING

INTERPRETED_SMS, INTERPRETED_CAPABILITY = 4, 80


def device_facts(tensor: Tensor) -> tuple[int, int]:
    """(number of SMs, compute capability as major * 10 + minor); for the interpreter, a small made-up GPU."""
    if not tensor.is_cuda:
        return INTERPRETED_SMS, INTERPRETED_CAPABILITY
    properties = torch.cuda.get_device_properties(tensor.device)
    return properties.multi_processor_count, properties.major * 10 + properties.minor


def launch(query: Tensor, key: Tensor | None, value: Tensor | None, past_key: Tensor, past_value: Tensor,
           past_lengths: Tensor, new_lengths: Tensor | None, cos: Tensor | None, sin: Tensor | None,
           sinks: Tensor | None, *, num_heads: int, scale: float, softcap: float, window: int, interleaved: bool,
           bound: int, ring: bool = False, key_scale: float = 0.0, value_scale: float = 0.0) -> Tensor:
    """Append, then attend (prefill, or decode and combine): at most three launches, nothing read from the device."""
    from gqa_plugins.grouped_attention.append import append
    from gqa_plugins.grouped_attention.decode import decode
    from gqa_plugins.grouped_attention.prefill import prefill

    batch, steps, _ = query.shape
    kv_heads, _, head = past_key.shape[1:]
    value_head = past_value.shape[3]
    output = query.new_empty(batch, steps, num_heads * value_head)
    if output.numel() == 0:
        return output
    sm_count, capability = device_facts(query)
    chosen = plan.plan(sequences=batch, steps=steps, heads=num_heads, kv_heads=kv_heads, head=head,
                       value_head=value_head, dtype=DTYPES[query.dtype], window=window, bound=bound,
                       sm_count=sm_count, capability=capability, cache=CACHES.get(past_key.dtype, ""))
    codes = Codes.of(query, kv_heads, key_scale, value_scale, key is not None) if key_scale else None
    rotated = append(query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin,
                     num_heads=num_heads, interleaved=interleaved, ring=ring, codes=codes)
    if chosen.kind == "decode":
        decode(rotated, past_key, past_value, past_lengths, new_lengths, sinks, output, num_heads=num_heads,
               scale=scale, softcap=softcap, window=window, tiles=chosen.tiles, programs=chosen.programs,
               ring=ring, codes=codes)
    else:
        prefill(rotated, past_key, past_value, past_lengths, new_lengths, sinks, output, num_heads=num_heads,
                scale=scale, softcap=softcap, window=window, tiles=chosen.tiles, ahead=chosen.ahead,
                ring=ring, codes=codes)
    return output


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@torch.library.custom_op("gqa_kernels::attend_in_place", mutates_args=("past_key", "past_value"))
def attend_in_place(query: Tensor, key: Tensor | None, value: Tensor | None, past_key: Tensor, past_value: Tensor,
                    past_lengths: Tensor, new_lengths: Tensor | None, cos: Tensor | None, sin: Tensor | None,
                    sinks: Tensor | None, num_heads: int, kv_num_heads: int, scale: float, softcap: float, window: int,
                    rotary_interleaved: bool, bound: int, backend: str, ring: bool = False, key_scale: float = 0.0,
                    value_scale: float = 0.0) -> Tensor:
    """Write the new tokens into the caches and return output [B, S, H*E]. ring: the caches are. key_scale, value_scale:
    of caches of codes; 0: they hold numbers."""
    if backend == "reference":
        output, present_key, present_value = reference.grouped_query_attention(
            query, key, value, past_key, past_value, past_lengths, _new_lengths(query, new_lengths), cos, sin, sinks,
            num_heads=num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap, window=window,
            rotary_interleaved=int(rotary_interleaved), growing=RING if ring else 0,
            cache_codes=CACHE_CODES[CACHES[past_key.dtype]] if key_scale else 0, key_scale=key_scale,
            value_scale=value_scale)
        if key is not None:
            past_key.copy_(present_key)
            past_value.copy_(present_value)
        return output
    device = torch.cuda.device_of(query)  # the kernels go to the tensors' device, whichever is current
    with device:
        return launch(query.contiguous(), _contiguous(key), _contiguous(value), past_key, past_value,
                      past_lengths.contiguous(), _contiguous(new_lengths), _contiguous(cos), _contiguous(sin),
                      _contiguous(sinks), num_heads=num_heads, scale=scale, softcap=softcap, window=window,
                      interleaved=rotary_interleaved, bound=bound, ring=ring, key_scale=key_scale,
                      value_scale=value_scale)


def _new_lengths(query: Tensor, new_lengths: Tensor | None) -> Tensor:
    if new_lengths is not None:
        return new_lengths
    return torch.full((query.shape[0],), query.shape[1], dtype=torch.int32, device=query.device)


def _output_like(query: Tensor, past_value: Tensor, num_heads: int) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], num_heads * past_value.shape[3])


@attend_in_place.register_fake
def _(query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin, sinks, num_heads, kv_num_heads,
      scale, softcap, window, rotary_interleaved, bound, backend, ring=False, key_scale=0.0, value_scale=0.0):
    return _output_like(query, past_value, num_heads)


@torch.library.custom_op("gqa_kernels::attend", mutates_args=())
def attend(query: Tensor, key: Tensor | None, value: Tensor | None, past_key: Tensor, past_value: Tensor,
           past_lengths: Tensor, new_lengths: Tensor | None, cos: Tensor | None, sin: Tensor | None,
           sinks: Tensor | None, num_heads: int, kv_num_heads: int, scale: float, softcap: float, window: int,
           rotary_interleaved: bool, bound: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Functional: (output [B, S, H*E], present_key [B, K, C, D], present_value [B, K, C, E]), all new tensors."""
    present_key, present_value = past_key.clone(), past_value.clone()
    output = attend_in_place(query, key, value, present_key, present_value, past_lengths, new_lengths, cos, sin, sinks,
                             num_heads, kv_num_heads, scale, softcap, window, rotary_interleaved, bound, backend)
    return output, present_key, present_value


@attend.register_fake
def _(query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin, sinks, num_heads, kv_num_heads,
      scale, softcap, window, rotary_interleaved, bound, backend):
    return (_output_like(query, past_value, num_heads), torch.empty_like(past_key), torch.empty_like(past_value))


@torch.library.custom_op("gqa_kernels::attend_backward", mutates_args=())
def attend_backward(grad_output: Tensor, grad_key: Tensor, grad_value: Tensor, query: Tensor, key: Tensor | None,
                    value: Tensor | None, past_key: Tensor, past_value: Tensor, past_lengths: Tensor,
                    new_lengths: Tensor | None, cos: Tensor | None, sin: Tensor | None, sinks: Tensor | None,
                    num_heads: int, kv_num_heads: int, scale: float, softcap: float, window: int,
                    rotary_interleaved: bool) -> list[Tensor]:
    """Gradients of query, key, value, past_key, past_value, sinks, in that order; an empty tensor for an absent one."""
    gradients = backward.gradients(
        grad_output, grad_key, grad_value, query, key, value, past_key, past_value, past_lengths,
        _new_lengths(query, new_lengths), cos, sin, sinks, num_heads=num_heads, kv_num_heads=kv_num_heads,
        scale=scale, softcap=softcap, window=window, interleaved=rotary_interleaved)
    return [query.new_empty(0) if gradient is None else gradient for gradient in gradients]


@attend_backward.register_fake
def _(grad_output, grad_key, grad_value, query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin,
      sinks, num_heads, kv_num_heads, scale, softcap, window, rotary_interleaved):
    return [query.new_empty(0) if t is None else torch.empty_like(t)
            for t in (query, key, value, past_key, past_value, sinks)]


def _keep(ctx, inputs, output) -> None:
    *tensors, num_heads, kv_num_heads, scale, softcap, window, rotary_interleaved, _bound, _backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.attributes = (num_heads, kv_num_heads, scale, softcap, window, rotary_interleaved)


def _backward(ctx, grad_output, grad_key, grad_value):
    query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin, sinks = ctx.saved_tensors
    if ctx.needs_input_grad[7] or ctx.needs_input_grad[8]:
        raise NotImplementedError("gqa_kernels::attend has no gradient for cos and sin: pass them detached")
    grads = attend_backward(grad_output, grad_key, grad_value, query, key, value, past_key, past_value, past_lengths,
                            new_lengths, cos, sin, sinks, *ctx.attributes)
    present = (query, key, value, past_key, past_value, sinks)
    of_query, of_key, of_value, of_past_key, of_past_value, of_sinks = (
        None if tensor is None else grad for tensor, grad in zip(present, grads, strict=True))
    return (of_query, of_key, of_value, of_past_key, of_past_value, None, None, None, None, of_sinks, *[None] * 8)


attend.register_autograd(_backward, setup_context=_keep)
