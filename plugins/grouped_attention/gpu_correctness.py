"""Every kernel against fp64 on a CUDA GPU, over a matrix of shapes, and once through a captured graph.

The yardstick is eager attention in the same precision (products in it, softmax in fp32): a kernel's error against fp64
may be at most twice eager's, plus 1e-6. Inputs are fresh, cache tails and outputs begin as NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gqa_plugins.grouped_attention import codes as codec
from gqa_plugins.grouped_attention import grouped_query_attention, reference
from gqa_plugins.grouped_attention.append import append
from gqa_plugins.grouped_attention.decode import decode
from gqa_plugins.grouped_attention.plan import FP8_CAPABILITY, Tiles, choose_tiles
from gqa_plugins.grouped_attention.prefill import prefill
from gqa_plugins.grouped_attention.validate import DTYPES

CODED_HEAD = 128  # cases of this head size run over caches of codes too


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head: int
    value_head: int
    dtype: torch.dtype
    lengths: tuple[tuple[int, int], ...]
    steps: int
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    rotary: int = 0

    def __str__(self) -> str:
        extras = [f"{name}{value}" for name, value in (("w", self.window), ("cap", self.softcap), ("rot", self.rotary),
                                                       ("sinks", int(self.sinks))) if value]
        return " ".join([f"{self.heads}/{self.kv_heads}x{self.head}", DTYPES[self.dtype],
                         f"S{self.steps}", f"past{[past for past, _ in self.lengths]}", *extras])


def cases(quick: bool = False) -> Iterator[Case]:
    """Model shapes, odd groups and head sizes; lengths around tile edges; each feature in every dtype."""
    shapes = [(32, 8, 128, 128), (14, 2, 64, 64), (4, 1, 256, 256), (9, 3, 64, 64), (7, 1, 80, 80), (16, 1, 192, 128),
              (5, 5, 96, 96), (6, 2, 40, 40), (64, 1, 128, 128), (8, 8, 8, 8)]
    lengths = [(((2047, 1), (0, 0), (1024, 1)), 1), (((0, 513), (0, 0), (100, 300)), 513), (((255, 4), (4000, 2)), 4)]
    features: list[dict[str, Any]] = [{}, {"window": 257}, {"softcap": 30.0, "sinks": True}, {"rotary": 2}]
    if quick:
        shapes, features = shapes[:4], features[:3]
    for number, (shape, (pairs, steps), dtype) in enumerate(itertools.product(shapes, lengths, DTYPES)):
        feature = dict(features[(number + number // len(features)) % len(features)])
        if feature.get("rotary"):
            feature["rotary"] = shape[2] // 2
        yield Case(*shape, dtype=dtype, lengths=pairs, steps=steps, **feature)


def _inputs(case: Case, device: torch.device) -> dict[str, torch.Tensor | None]:
    batch, capacity = len(case.lengths), max(past + new for past, new in case.lengths) + 5

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(case.dtype)

    made: dict[str, torch.Tensor | None] = {
        "query": normal(batch, case.steps, case.heads * case.head) * 2,
        "key": normal(batch, case.steps, case.kv_heads * case.head),
        "value": normal(batch, case.steps, case.kv_heads * case.value_head),
        "past_key": normal(batch, case.kv_heads, capacity, case.head),
        "past_value": normal(batch, case.kv_heads, capacity, case.value_head),
        "past_lengths": torch.tensor([past for past, _ in case.lengths], dtype=torch.int32, device=device),
        "new_lengths": torch.tensor([new for _, new in case.lengths], dtype=torch.int32, device=device),
        "cos": None, "sin": None, "sinks": normal(case.heads) if case.sinks else None}
    for b, (past, new) in enumerate(case.lengths):
        for name in ("past_key", "past_value"):
            made[name][b, :, past:] = torch.nan  # type: ignore[index]
        for name in ("query", "key", "value"):
            made[name][b, new:] = torch.nan  # type: ignore[index]
    if case.rotary:
        angles = torch.arange(capacity, device=device)[:, None] * 0.5 ** torch.arange(case.rotary // 2, device=device)
        made["cos"], made["sin"] = angles.cos().to(case.dtype), angles.sin().to(case.dtype)
    return made


def _eager(case: Case, given: dict[str, torch.Tensor | None], key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention in the case's precision over fp64 caches that hold the new tokens, sequence by sequence."""
    query_all = given["query"]
    assert query_all is not None
    output = torch.zeros(*query_all.shape[:2], case.heads * case.value_head, dtype=case.dtype, device=query_all.device)
    for b, (past, new) in enumerate(case.lengths):
        if not new:
            continue
        row = past + torch.arange(new, device=query_all.device)
        query = query_all[b, :new].view(1, new, case.heads, case.head)
        if given["cos"] is not None and given["sin"] is not None:
            query = reference.rotate(query, given["cos"], given["sin"], row[None], False)
        keys, values = (t[b, :, :past + new].to(case.dtype).repeat_interleave(case.heads // case.kv_heads, 0)
                        for t in (key, value))
        scores = query[0].transpose(0, 1) @ keys.transpose(1, 2) * case.head**-0.5
        if case.softcap:
            scores = torch.tanh(scores / case.softcap) * case.softcap
        column = torch.arange(past + new, device=row.device)
        hidden = column > row[:, None]
        if case.window:
            hidden |= column <= row[:, None] - case.window
        scores = scores.masked_fill(hidden, -torch.inf)
        if given["sinks"] is not None:
            scores = torch.cat((scores, given["sinks"][:, None, None].expand(-1, new, 1)), -1)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(case.dtype)[..., :past + new]
        output[b, :new] = (weights @ values).transpose(0, 1).reshape(new, -1)
    return output


@dataclass(frozen=True)
class Problem:
    """Inputs of the operator by the contract's names, what fp64 gives for them, and the error that is allowed."""

    given: dict[str, torch.Tensor | None]
    expected: torch.Tensor
    present_key: torch.Tensor
    present_value: torch.Tensor
    allowed: float


def attributes_of(case: Case) -> dict[str, Any]:
    """The operator's attributes, those of every backend."""
    return {"num_heads": case.heads, "scale": case.head**-0.5, "softcap": case.softcap, "window": case.window}


def make_problem(case: Case, device: torch.device) -> Problem:
    """Fresh inputs on the device, and the reference's answer to them."""
    given = _inputs(case, device)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in given.values()]
    expected, present_key, present_value = reference.grouped_query_attention(
        *wide, kv_num_heads=case.kv_heads, rotary_interleaved=0, growing=0, **attributes_of(case))
    error = (_eager(case, given, present_key, present_value).double() - expected).abs().max().item()
    return Problem(given, expected, present_key, present_value, 2 * error + 1e-6)


def judge(case: Case, kernel: str, output: torch.Tensor, problem: Problem) -> dict[str, Any]:
    """One row: the error, what is allowed, whether it passed."""
    error = (output.double() - problem.expected).abs().max().item()
    padded = all(bool((output[b, new:] == 0).all()) for b, (_, new) in enumerate(case.lengths))
    return {"case": str(case), "kernel": kernel, "error": error, "allowed": problem.allowed,
            "passed": error <= problem.allowed and padded}  # NaN is never <=


def check(case: Case, device: torch.device, capability: int) -> list[dict[str, Any]]:
    """Both attention kernels on one case: a row each with error, allowed error and whether it passed."""
    problem = make_problem(case, device)
    given, attributes = problem.given, attributes_of(case)
    rotated = append(*list(given.values())[:9], num_heads=case.heads, interleaved=False)
    tiles = choose_tiles(case.steps * case.heads // case.kv_heads, case.head, case.value_head, DTYPES[case.dtype],
                         capability)
    rows = []
    for kernel in ("prefill", "decode"):
        output = torch.full_like(problem.expected, torch.nan, dtype=case.dtype)
        arguments = (rotated, given["past_key"], given["past_value"], given["past_lengths"], given["new_lengths"],
                     given["sinks"], output)
        if kernel == "prefill":
            prefill(*arguments, **attributes, tiles=tiles)
        else:
            decode(*arguments, **attributes, tiles=tiles, programs=5 * len(case.lengths))
        rows.append(judge(case, kernel, output, problem))
    for cache in ("int8", "fp8") if case.head == CODED_HEAD else ():
        if cache == "int8" or capability >= FP8_CAPABILITY:
            rows += check_codes(case, given, cache, tiles)
    return rows


def check_codes(case: Case, given: dict[str, torch.Tensor | None], cache: str, tiles: Tiles) -> list[dict[str, Any]]:
    """Both kernels over a cache of codes, against fp64 over the codes that append wrote: a row each. The codes of
    values, which nothing rotates, are the rule's."""
    kind = next(dtype for dtype, name in codec.CACHES.items() if name == cache)
    scales = (4 / 127, 4 / 127) if cache == "int8" else (4 / 448, 4 / 448)
    caches = [codec.encode(given[name].double().nan_to_num(1e9), scale, kind)  # type: ignore[union-attr]
              for name, scale in zip(("past_key", "past_value"), scales, strict=True)]
    plain = [given[name] for name in ("query", "key", "value")]
    codes = codec.Codes.of(plain[0], case.kv_heads, *scales, has_new=True)  # type: ignore[arg-type]
    rest = list(given.values())[5:]  # lengths, tables, sinks
    rotated = append(*plain, *caches, *rest[:4], num_heads=case.heads, interleaved=False,  # type: ignore[arg-type]
                     codes=codes)
    held = [codec.decode(codes_there, scale, torch.float64) for codes_there, scale in zip(caches, scales, strict=True)]
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in rest]
    expected, *_ = reference.grouped_query_attention(
        plain[0].double(), None, None, *held, *wide,  # type: ignore[union-attr, arg-type]
        kv_num_heads=case.kv_heads, rotary_interleaved=0, growing=0, **attributes_of(case))
    allowed = 2 * (_eager(case, given, *held).double() - expected).abs().max().item() + 1e-6
    wanted = codec.encode(plain[2].float(), scales[1], kind)  # type: ignore[union-attr]
    wanted = wanted.view(*wanted.shape[:2], case.kv_heads, -1).view(torch.int8)
    right = all(torch.equal(caches[1][b, :, past:past + new].view(torch.int8).transpose(0, 1), wanted[b, :new])
                for b, (past, new) in enumerate(case.lengths))
    problem = Problem(given, expected, *held, allowed)
    rows = []
    for kernel, run, more in (("prefill", prefill, {}), ("decode", decode, {"programs": 5 * len(case.lengths)})):
        output = torch.full_like(expected, torch.nan, dtype=case.dtype)
        run(rotated, *caches, *rest[:2], given["sinks"], output, **attributes_of(case), tiles=tiles, codes=codes,
            **more)
        row = judge(case, kernel, output, problem)
        rows.append({**row, "kernel": f"{kernel}, {cache} cache", "passed": row["passed"] and right})
    return rows


def check_graph(device: torch.device) -> dict[str, Any]:
    """Capture one decode step, replay it at other lengths, compare with the call outside the graph."""
    batch, capacity, dtype = 3, 4096, torch.bfloat16
    query, key, value = (torch.randn(batch, 1, heads * 128, device=device).to(dtype) for heads in (32, 8, 8))
    past_key, past_value = (torch.randn(batch, 8, capacity, 128, device=device).to(dtype) for _ in range(2))
    lengths = torch.tensor([5, 100, 4000], dtype=torch.int32, device=device)

    def step() -> torch.Tensor:
        return grouped_query_attention(query, key, value, past_key, past_value, lengths, num_heads=32, kv_num_heads=8,
                                       scale=128**-0.5)[0]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    worst = 0.0
    for values in ([5, 100, 4000], [0, 4095, 17], [2048, 1, 3000]):
        lengths.copy_(torch.tensor(values, dtype=torch.int32))
        graph.replay()
        replayed = captured.clone()
        difference = (replayed.double() - step().double()).abs().max().item()
        worst = max(worst, difference if replayed.isfinite().all() else float("inf"))
    return {"passed": worst == 0.0, "note": f"largest difference {worst:.3g} at three sets of lengths"}


def check_far(device: torch.device, capacity: int = 2**20, kv_heads: int = 8, head: int = 128) -> dict[str, Any]:
    """One decode step at the end of a full cache whose tensors pass 2^31 elements: are addresses 64 bits wide?

    Two sequences of `capacity` tokens, bf16; the last key/value head of the last sequence is judged, against fp64.
    """
    shape, group, scale = (2, kv_heads, capacity, head), 4, head**-0.5
    elements = 2 * kv_heads * capacity * head
    case = f"{group * kv_heads}/{kv_heads}x{head} bf16 S1 past{[capacity - 1] * 2}, {elements} elements a cache"
    needed = 2 * 2 * elements
    if device.type == "cuda" and needed > 0.5 * torch.cuda.get_device_properties(device).total_memory:
        return {"case": case, "kernel": "entry", "error": 0.0, "allowed": 0.0, "passed": None}
    past_key, past_value = (torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
    query, key, value = (torch.randn(2, 1, heads * head, device=device).to(torch.bfloat16)
                         for heads in (group * kv_heads, kv_heads, kv_heads))
    lengths = torch.full((2,), capacity - 1, dtype=torch.int32, device=device)
    output, _, _ = grouped_query_attention(query, key, value, past_key, past_value, lengths,
                                           num_heads=group * kv_heads, kv_num_heads=kv_heads, scale=scale)
    written = torch.equal(past_key[1, -1, -1], key[1, 0, -head:]) and torch.equal(past_value[1, -1, -1],
                                                                                  value[1, 0, -head:])
    rows, keys, values = query[1].view(-1, head)[-group:], past_key[1, -1], past_value[1, -1]
    expected = torch.softmax(rows.double() @ keys.double().T * scale, -1) @ values.double()
    eager = torch.softmax(rows @ keys.T * scale, -1, dtype=torch.float32).to(rows.dtype) @ values
    allowed = 2 * (eager.double() - expected).abs().max().item() + 1e-6
    error = (output[1].view(-1, head)[-group:].double() - expected).abs().max().item()
    return {"case": case, "kernel": "entry", "error": error, "allowed": allowed, "passed": written and error <= allowed}
