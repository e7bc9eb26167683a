"""Times of decode and prefill on a CUDA GPU, beside those of other implementations (`gpu_peers`).

Time: median of CUDA-graph replays by events (calls where a peer cannot be captured), over several copies of
the inputs when one would stay in the L2 cache. Ceilings are measured first, in the same process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from gqa_plugins.grouped_attention import grouped_query_attention, plan
from gqa_plugins.grouped_attention.gpu_peers import Call, Inputs
from gqa_plugins.grouped_attention.gpu_peers import measure as peers_of
from gqa_plugins.grouped_attention.ops import device_facts
from gqa_plugins.grouped_attention.validate import DTYPES

REPLAYS = 20
MOST_COPIES = 64
RAGGED = (131072, *(1024,) * 15)


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


def copies_beyond_cache(cache_bytes: int, l2_bytes: int) -> int:
    """How many copies of a KV cache take turns so that none is left in the L2 cache when its turn comes again: four
    times the L2 cache in all, but at most MOST_COPIES."""
    return min(MOST_COPIES, max(1, -(-4 * l2_bytes // cache_bytes)))


def measure(kind: str, batch: int, length: int, heads: int, kv_heads: int, head: int, dtype: torch.dtype,
            device: torch.device, copy_gb_s: float, *, math: bool = True) -> dict[str, Any] | None:
    """One row of the table; None where the inputs would not fit in 40 % of the card's memory.

    kind "decode": one new token after length - 1; "prefill": `length` new tokens on an empty cache. ours_ms is
    attention alone, as the peers; step_ms has the append too; in_turn_ms is prefill by the earlier loop, where the plan
    takes the one that works ahead. math: SDPA's plain backend is timed too.
    """
    steps = length if kind == "prefill" else 1
    return _row(kind, (length,) * batch, steps, heads, kv_heads, head, dtype, device, copy_gb_s, math)


def measure_ragged(lengths: tuple[int, ...], heads: int, kv_heads: int, head: int, dtype: torch.dtype,
                   device: torch.device, copy_gb_s: float) -> dict[str, Any] | None:
    """The same for one new token after sequences of different lengths: gb_s counts the tokens that are there."""
    return _row("ragged", lengths, 1, heads, kv_heads, head, dtype, device, copy_gb_s, False)


def _row(kind: str, lengths: tuple[int, ...], steps: int, heads: int, kv_heads: int, head: int, dtype: torch.dtype,
         device: torch.device, copy_gb_s: float, math: bool) -> dict[str, Any] | None:
    batch, length = len(lengths), max(lengths)
    properties = torch.cuda.get_device_properties(device)
    token_bytes = 2 * kv_heads * head * dtype.itemsize
    cache_bytes, read_bytes = batch * length * token_bytes, sum(lengths) * token_bytes
    # Our copy and a peer's in pages, or with the heads of a group written out: three caches.
    if 3 * cache_bytes + 4 * batch * heads * steps * head * dtype.itemsize > 0.4 * properties.total_memory:
        return None
    l2_bytes = getattr(properties, "L2_cache_size", 64 * 2**20)
    copies = 1 if kind == "prefill" else copies_beyond_cache(cache_bytes, l2_bytes)
    sets, ours, steps_of_ours = [], [], []
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": head**-0.5, "max_length": length}
    past = torch.tensor([each - steps for each in lengths], dtype=torch.int32, device=device)
    for _ in range(copies):
        query = torch.randn(batch, steps, heads * head, device=device).to(dtype)
        key, value = (torch.randn(batch, steps, kv_heads * head, device=device).to(dtype) for _ in range(2))
        cache = [torch.randn(batch, kv_heads, length, head, device=device, dtype=torch.float16).to(dtype)
                 for _ in range(2)]
        sets.append(Inputs(query.view(batch, steps, heads, head).transpose(1, 2).contiguous(), *cache,
                           lengths if kind == "ragged" else None, kind == "prefill"))
        ours.append(partial(grouped_query_attention, query, None, None, *cache, past, **attributes))
        steps_of_ours.append(partial(grouped_query_attention, query, key, value, *cache, past, **attributes))
    step_ms, ours_ms = time_ms(steps_of_ours), time_ms(ours)
    shape = f"{heads}/{kv_heads} D{head} {str(dtype).removeprefix('torch.')}"
    row = {"kind": kind, "shape": shape, "batch": batch, "length": length, "ours_ms": ours_ms, "step_ms": step_ms,
           "gb_s": read_bytes / ours_ms / 1e6, "of_copy": read_bytes / ours_ms / 1e6 / copy_gb_s, "tflop_s": 0.0,
           "tokens": sum(lengths)}
    if kind == "prefill":
        row["tflop_s"] = 2 * batch * heads * head * length * length / ours_ms / 1e9
        row["in_turn_ms"] = _in_turn_ms(ours, heads // kv_heads, length, head, dtype, device)
    row["peers"] = peers_of(sets, time_ms, math=math and (
        batch * heads * steps * length * 4 <= 0.2 * properties.total_memory))
    return row


def _in_turn_ms(calls: Sequence[Call], group: int, steps: int, head: int, dtype: torch.dtype,
                device: torch.device) -> float | None:
    """Time of prefill whose products wait for the softmax; None where the plan takes that loop anyway."""
    capability = device_facts(calls[0].args[0])[1]
    tiles = plan.choose_tiles(steps * group, head, head, DTYPES[dtype], capability)
    if not plan.works_ahead(tiles, head, head, DTYPES[dtype], capability):
        return None
    with patch.object(plan, "works_ahead", lambda *_: False):
        return time_ms(calls)


def points(kind: str, quick: bool) -> list[tuple[int, int]]:
    """(batch, length) of the benchmark."""
    if kind == "prefill":
        return [(1, 8192)] if quick else [(1, 1024), (4, 2048), (1, 8192), (4, 8192), (1, 32768)]
    if quick:
        return [(1, 1024), (1, 32768), (16, 32768)]
    return [(batch, length) for batch in (1, 4, 16, 64) for length in (1024, 8192, 32768, 131072)]
