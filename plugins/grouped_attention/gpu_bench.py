"""Times of decode and prefill on a CUDA GPU, beside PyTorch's SDPA and, where importable, flash-attn and FlashInfer.

Time: median of CUDA-graph replays by events (calls where a peer cannot be captured), over several copies of
the inputs when one would stay in the L2 cache. Ceilings are measured first, in the same process.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gqa_plugins.grouped_attention import grouped_query_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

REPLAYS = 20
MOST_COPIES = 64
BACKENDS = {"sdpa-flash": "FLASH_ATTENTION", "sdpa-cudnn": "CUDNN_ATTENTION",
            "sdpa-efficient": "EFFICIENT_ATTENTION", "sdpa-math": "MATH"}
Call = Callable[[], Any]


def time_ms(calls: Sequence[Call]) -> float:
    """Median time of one call, the calls (the same work on different copies of the inputs) taking turns."""
    for call in (*calls, *calls):
        call()
    torch.cuda.synchronize()
    rounds = max(1, 8 // len(calls))

    def everything() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    run: Callable[[], Any] = everything
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            everything()
        run = graph.replay
    except RuntimeError:  # this peer synchronises or allocates in a way that cannot be captured: time plain calls
        torch.cuda.synchronize()
    run()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / (rounds * len(calls)))
    return statistics.median(times)


def ceilings(device: torch.device) -> dict[str, float]:
    """Copy bandwidth (bytes read plus written, 2 GiB) and the rate of an 8192-cubed bf16 product, on random data."""
    elements = 2**29
    copied = [torch.randint(0, 2**31 - 1, (elements,), dtype=torch.int32, device=device) for _ in range(2)]
    copy_ms = time_ms([lambda: copied[0].copy_(copied[1])])
    copied.clear()
    a, b = (torch.randn(8192, 8192, device=device).to(torch.bfloat16) for _ in range(2))
    matmul_ms = time_ms([lambda: a @ b])
    return {"copy_gb_s": 2 * elements * 4 / copy_ms / 1e6, "matmul_tflop_s": 2 * 8192**3 / matmul_ms / 1e9}


def _attempt(calls: Sequence[Call]) -> float | str:
    try:
        return time_ms(calls)
    except Exception as error:  # a peer may refuse in any way it likes; the reason goes into the table
        torch.cuda.synchronize()
        return f"did not run: {str(error).splitlines()[0][:60] if str(error) else type(error).__name__}"


def _sdpa(name: str, sets: list[tuple[torch.Tensor, ...]], causal: bool) -> float | str:
    backend = getattr(SDPBackend, BACKENDS[name], None)
    if backend is None:
        return "not in this PyTorch"
    with sdpa_kernel(backend):
        return _attempt([partial(scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=True)
                         for q, k, v in sets])


def _others(sets: list[tuple[torch.Tensor, ...]], causal: bool) -> dict[str, float | str]:
    """flash-attn and FlashInfer where they are importable. They want [B, T, heads, D]: copied before the clock runs."""
    found: dict[str, float | str] = {}
    for module, name, calls in (("flash_attn", "flash-attn", _flash_attn), ("flashinfer", "flashinfer", _flashinfer)):
        try:
            package = importlib.import_module(module)
        except Exception:  # absent, or present and broken on this machine: either way not a peer here
            continue
        if module == "flashinfer" and sets[0][0].shape[0] > 1:
            found[name] = "single-sequence interface only"
            continue
        turned = [[t.transpose(1, 2).contiguous() for t in one] for one in sets]
        found[name] = _attempt([calls(package, q, k, v, causal) for q, k, v in turned])
    return found


def _flash_attn(package: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> Call:
    if causal:
        return lambda: package.flash_attn_func(query, key, value, causal=True)
    return lambda: package.flash_attn_with_kvcache(query, key, value)


def _flashinfer(package: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> Call:
    if causal:
        return lambda: package.single_prefill_with_kv_cache(query[0], key[0], value[0], causal=True)
    return lambda: package.single_decode_with_kv_cache(query[0, 0], key[0], value[0])


def copies_beyond_cache(cache_bytes: int, l2_bytes: int) -> int:
    """How many copies of a KV cache take turns so that none is left in the L2 cache when its turn comes again: four
    times the L2 cache in all, but at most MOST_COPIES."""
    return min(MOST_COPIES, max(1, -(-4 * l2_bytes // cache_bytes)))


def measure(kind: str, batch: int, length: int, heads: int, kv_heads: int, head: int, dtype: torch.dtype,
            device: torch.device, copy_gb_s: float) -> dict[str, Any] | None:
    """One row of the table; None where the inputs would not fit in 40 % of the card's memory.

    kind "decode": one new token after length - 1; "prefill": `length` new tokens on an empty cache. ours_ms is
    attention alone, as the peers; step_ms has the append too.
    """
    steps = length if kind == "prefill" else 1
    properties = torch.cuda.get_device_properties(device)
    cache_bytes = 2 * batch * kv_heads * length * head * dtype.itemsize
    # Our copy and the peers' (flash-attn and FlashInfer in another layout): three caches.
    if 3 * cache_bytes + 4 * batch * heads * steps * head * dtype.itemsize > 0.4 * properties.total_memory:
        return None
    l2_bytes = getattr(properties, "L2_cache_size", 64 * 2**20)
    copies = 1 if kind == "prefill" else copies_beyond_cache(cache_bytes, l2_bytes)
    sets, ours, steps_of_ours = [], [], []
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": head**-0.5, "max_length": length}
    past = torch.full((batch,), length - steps, dtype=torch.int32, device=device)
    for _ in range(copies):
        query = torch.randn(batch, steps, heads * head, device=device).to(dtype)
        key, value = (torch.randn(batch, steps, kv_heads * head, device=device).to(dtype) for _ in range(2))
        cache = [torch.randn(batch, kv_heads, length, head, device=device, dtype=torch.float16).to(dtype)
                 for _ in range(2)]
        sets.append((query.view(batch, steps, heads, head).transpose(1, 2).contiguous(), *cache))
        ours.append(partial(grouped_query_attention, query, None, None, *cache, past, **attributes))
        steps_of_ours.append(partial(grouped_query_attention, query, key, value, *cache, past, **attributes))
    step_ms, ours_ms = time_ms(steps_of_ours), time_ms(ours)
    peers = {name: _sdpa(name, sets, kind == "prefill") for name in BACKENDS if not (
        name == "sdpa-math" and batch * heads * steps * length * 4 > 0.2 * properties.total_memory)}
    peers.update(_others(sets, kind == "prefill"))
    gb_s = cache_bytes / ours_ms / 1e6
    return {"kind": kind, "shape": f"{heads}/{kv_heads} D{head} {str(dtype).removeprefix('torch.')}", "batch": batch,
            "length": length, "ours_ms": ours_ms, "step_ms": step_ms, "gb_s": gb_s, "of_copy": gb_s / copy_gb_s,
            "tflop_s": 2 * batch * heads * head * length * length / ours_ms / 1e9 if kind == "prefill" else 0.0,
            "peers": peers}


def points(kind: str, quick: bool) -> list[tuple[int, int]]:
    """(batch, length) of the benchmark."""
    if kind == "prefill":
        return [(1, 8192)] if quick else [(1, 1024), (4, 2048), (1, 8192), (4, 8192), (1, 32768)]
    if quick:
        return [(1, 1024), (1, 32768), (16, 32768)]
    return [(batch, length) for batch in (1, 4, 16, 64) for length in (1024, 8192, 32768, 131072)]
