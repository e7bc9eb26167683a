"""Other implementations of attention that are timed beside ours: SDPA's backends, FlashAttention 2 and 3, FlashInfer.

Each gets the same query and the same cache, in the layout that it wants, copied before the clock runs. A peer that is
not installed, or that refuses a shape, has its reason in place of a time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {"sdpa-flash": "FLASH_ATTENTION", "sdpa-cudnn": "CUDNN_ATTENTION",
            "sdpa-efficient": "EFFICIENT_ATTENTION", "sdpa-math": "MATH"}
FLASH_ATTENTION = {"flash-attn-3": ("flash_attn_interface", "fa3_fwd_interface"), "flash-attn": ("flash_attn",)}
PAGE, WORKSPACE_BYTES = 64, 256 * 2**20  # of FlashInfer's paged cache, and what it may use beside
NOT_INSTALLED = "not installed"
Call = Callable[[], Any]
Clock = Callable[[Sequence[Call]], float]


@dataclass(frozen=True)
class Inputs:
    """query [B, H, S, D]; key and value [B, K, C, D]; lengths: valid tokens of each sequence, None where the cache is
    full; causal: S new tokens that see what is before them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    lengths: tuple[int, ...] | None = None
    causal: bool = False

    @property
    def lengths_here(self) -> torch.Tensor:
        """The lengths on the device, int32."""
        found = self.lengths or (self.key.shape[2],) * self.key.shape[0]
        return torch.tensor(found, dtype=torch.int32, device=self.query.device)


def attempt(clock: Clock, prepare: Callable[[], Sequence[Call]]) -> float | str:
    """Its time in ms, or why there is none."""
    try:
        return clock(prepare())
    except Exception as error:  # a peer may refuse in any way it likes; the reason goes into the table
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return f"did not run: {str(error).splitlines()[0][:60] if str(error) else type(error).__name__}"


def measure(sets: Sequence[Inputs], clock: Clock, *, math: bool) -> dict[str, float | str]:
    """Name -> ms, or why it was not measured. math: also SDPA's plain backend, which takes long and is never first."""
    found = {name: _sdpa(name, sets, clock) for name in BACKENDS if math or name != "sdpa-math"}
    for name, modules in FLASH_ATTENTION.items():
        package = first_of(modules)
        found[name] = NOT_INSTALLED if package is None else attempt(clock, partial(_flash_attention, package, sets))
    package = first_of(("flashinfer",))
    found["flashinfer"] = NOT_INSTALLED if package is None else attempt(clock, partial(_flashinfer, package, sets))
    return found


def first_of(modules: Sequence[str]) -> Any:
    """The first of them that can be imported; None if none can, in whatever way it fails."""
    for name in modules:
        try:
            return importlib.import_module(name)
        except Exception:  # absent, or present and broken on this machine: either way not a peer here
            continue
    return None


def _sdpa(name: str, sets: Sequence[Inputs], clock: Clock) -> float | str:
    backend = getattr(SDPBackend, BACKENDS[name], None)
    if backend is None:
        return "not in this PyTorch"

    def calls() -> list[Call]:
        masks = [_mask(one) for one in sets]
        return [partial(scaled_dot_product_attention, one.query, one.key, one.value, attn_mask=mask,
                        is_causal=one.causal, enable_gqa=True) for one, mask in zip(sets, masks, strict=True)]

    with sdpa_kernel(backend):
        return attempt(clock, calls)


def _mask(one: Inputs) -> torch.Tensor | None:
    if one.lengths is None:
        return None
    return (torch.arange(one.key.shape[2], device=one.query.device) < one.lengths_here[:, None])[:, None, None]


def _flash_attention(package: Any, sets: Sequence[Inputs]) -> list[Call]:
    """Both versions take [B, S, heads, D], a view of ours: a head's features lie together either way."""
    calls: list[Call] = []
    for one in sets:
        query, key, value = (tensor.transpose(1, 2) for tensor in (one.query, one.key, one.value))
        if one.causal:
            calls.append(partial(package.flash_attn_func, query, key, value, causal=True))
        else:
            calls.append(partial(package.flash_attn_with_kvcache, query, key, value, cache_seqlens=one.lengths_here))
    return calls


def _flashinfer(package: Any, sets: Sequence[Inputs]) -> list[Call]:
    """Prefill of one sequence; decode of a batch from pages, planned on the host before the clock runs."""
    calls: list[Call] = []
    for one in sets:
        batch, kv_heads, capacity, head = one.key.shape
        if one.causal:
            if batch > 1:
                raise NotImplementedError("single-sequence interface only")
            turned = [tensor[0].transpose(0, 1).contiguous() for tensor in (one.query, one.key, one.value)]
            calls.append(partial(package.single_prefill_with_kv_cache, *turned, causal=True))
            continue
        pages = capacity // PAGE
        cache = torch.stack([tensor.view(batch, kv_heads, pages, PAGE, head).transpose(1, 2).reshape(
            batch * pages, kv_heads, PAGE, head) for tensor in (one.key, one.value)], 1)
        lengths = one.lengths or (capacity,) * batch
        held = [-(-length // PAGE) for length in lengths]
        of_each = [torch.arange(count) + b * pages for b, count in enumerate(held)]
        starts = torch.tensor([0, *held]).cumsum(0)
        last = torch.tensor([(length - 1) % PAGE + 1 for length in lengths])
        device = one.query.device
        indptr, indices, last_page = (t.to(torch.int32).to(device) for t in (starts, torch.cat(of_each), last))
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(indptr, indices, last_page, one.query.shape[1], kv_heads, head, PAGE,
                     q_data_type=one.query.dtype, kv_data_type=one.key.dtype)
        calls.append(partial(wrapper.run, one.query[:, :, 0].contiguous(), cache))
    return calls
