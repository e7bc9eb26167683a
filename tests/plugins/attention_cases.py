"""Seeded attention problems, their fp64 truth, the error of eager at the same precision, and memory guards.

A sequence's truth is that sequence alone, unpadded, in fp64. Eager computes as `transformers` does: products in the
low precision, softmax in fp32, weights rounded, products again. Its error is the yardstick for the kernels'.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import torch
from gqa_plugins.grouped_attention import codes as codec
from gqa_plugins.grouped_attention import plan, reference
from gqa_plugins.grouped_attention.plan import Tiles

from gqa_export.attention_op import CACHE_CODES

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
GUARD = 64
SCALES = {"int8": (0.021, 0.034), "fp8": (0.0052, 0.0037)}  # numbers of the cases beyond 2.7 and 4.3, 2.3 and 1.7 clip
SMALL = Tiles(rows=16, keys=16, warps=4, stages=1)  # edges at 16, so that short (fast) sequences cross them


@dataclass(frozen=True)
class Case:
    """lengths: (past, new) of each sequence; steps S; everything else as in the contract."""

    lengths: tuple[tuple[int, int], ...]
    steps: int
    capacity: int = 64
    heads: int = 4
    kv_heads: int = 2
    head: int = 16
    value_head: int = 16
    dtype: str = "fp32"
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    rotary: int = 0
    interleaved: bool = False
    seed: int = 0

    @property
    def attributes(self) -> dict:
        return {"num_heads": self.heads, "kv_num_heads": self.kv_heads, "scale": self.head**-0.5,
                "softcap": self.softcap, "window": self.window}


@dataclass
class Problem:
    """Tensors of a case; everything unspecified (cache tails, padded rows) is NaN."""

    case: Case
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    past_key: torch.Tensor
    past_value: torch.Tensor
    past_lengths: torch.Tensor
    new_lengths: torch.Tensor
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    guards: list = field(default_factory=list)
    scales: tuple[float, float] | None = None

    def tensors(self) -> tuple:
        return (self.query, self.key, self.value, self.past_key, self.past_value, self.past_lengths, self.new_lengths,
                self.cos, self.sin, self.sinks)


def guarded(tensor: torch.Tensor, guards: list) -> torch.Tensor:
    """The same values between two fences; `assert_guards` sees a write to either side."""
    fence = 777.0 if tensor.is_floating_point() else 99 if tensor.dtype == torch.int8 else 12345
    flat = torch.full((tensor.numel() + 2 * GUARD,), fence, dtype=tensor.dtype)
    inside = flat[GUARD: GUARD + tensor.numel()]
    inside.copy_(tensor.reshape(-1))
    guards.append((flat, fence))
    return inside.view(tensor.shape)


def assert_guards(guards: list) -> None:
    for flat, fence in guards:
        assert (flat[:GUARD] == fence).all(), "a write before a buffer"
        assert (flat[-GUARD:] == fence).all(), "a write past a buffer"


def make(case: Case) -> Problem:
    """Fresh inputs from the case's own seed, guarded on both sides."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    dtype, guards, batch = DTYPES[case.dtype], [], len(case.lengths)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query = normal(batch, case.steps, case.heads * case.head) * 2
    key = normal(batch, case.steps, case.kv_heads * case.head)
    value = normal(batch, case.steps, case.kv_heads * case.value_head)
    past_key = normal(batch, case.kv_heads, case.capacity, case.head)
    past_value = normal(batch, case.kv_heads, case.capacity, case.value_head)
    for b, (past, new) in enumerate(case.lengths):
        for tensor in (query, key, value):
            tensor[b, new:] = torch.nan
        past_key[b, :, max(past, 0):] = torch.nan
        past_value[b, :, max(past, 0):] = torch.nan
    cos = sin = None
    if case.rotary:
        angles = torch.arange(case.capacity)[:, None] * 0.3 ** torch.arange(case.rotary // 2)[None, :]
        cos, sin = guarded(angles.cos().to(dtype), guards), guarded(angles.sin().to(dtype), guards)
    sinks = normal(case.heads) * 2 if case.sinks else None
    if sinks is not None:
        sinks[0] = -torch.inf  # none for this head
    lengths = torch.tensor(case.lengths, dtype=torch.int32).reshape(batch, 2)
    return Problem(case, guarded(query, guards), guarded(key, guards), guarded(value, guards),
                   guarded(past_key, guards), guarded(past_value, guards), guarded(lengths[:, 0], guards),
                   guarded(lengths[:, 1], guards), cos, sin, None if sinks is None else guarded(sinks, guards), guards)


def run_kernels(problem: Problem, kind: str, tiles: Tiles = SMALL, programs: int = 3,
                least_keys: int = 1, ahead: bool = False, ring: bool = False) -> torch.Tensor:
    """Append, then prefill or decode and combine, through their launchers; outputs and workspace begin as NaN. ring:
    the caches are (`ring_of`)."""
    from gqa_plugins.grouped_attention import append, decode, prefill

    case = problem.case
    output = guarded(torch.full((len(case.lengths), case.steps, case.heads * case.value_head), torch.nan,
                                dtype=DTYPES[case.dtype]), problem.guards)
    codes = None
    if problem.scales:
        codes = codec.Codes.of(problem.query, case.kv_heads, *problem.scales, has_new=problem.key is not None)
        if codes.faults is not None:
            codes = replace(codes, faults=guarded(torch.full_like(codes.faults, -7), problem.guards))
    rotated = append.append(*problem.tensors()[:9], num_heads=case.heads, interleaved=case.interleaved,
                            ring=ring, codes=codes)
    attributes = {"num_heads": case.heads, "scale": case.head**-0.5, "softcap": case.softcap, "window": case.window,
                  "tiles": tiles, "ring": ring, "codes": codes}
    arguments = (rotated, problem.past_key, problem.past_value, problem.past_lengths, problem.new_lengths,
                 problem.sinks, output)
    if kind == "prefill":
        prefill.prefill(*arguments, **attributes, ahead=ahead)
    else:
        with guarded_workspace(decode, problem.guards), patch.object(plan, "LEAST_KEYS", least_keys):
            decode.decode(*arguments, **attributes, programs=programs)
    return output


@contextmanager
def guarded_workspace(module, guards: list) -> Iterator[None]:
    """Let the module's workspace lie between guards, filled with NaN: what is read must have been written."""

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def empty(size, dtype, device):
            unwritten = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
            return guarded(torch.full((size,), unwritten, dtype=dtype, device=device), guards)

    original, module.torch = module.torch, Torch()
    try:
        yield
    finally:
        module.torch = original


def ring_of(problem: Problem, slots: int) -> Problem:
    """The same problem over rings of so many slots: what no new row sees is NaN, the tokens between included."""
    guards: list = []
    rings = []
    for cache in (problem.past_key, problem.past_value):
        ring = torch.full((*cache.shape[:2], slots, cache.shape[3]), torch.nan, dtype=cache.dtype)
        for b, (past, _) in enumerate(problem.case.lengths):
            for token in range(max(0, past - problem.case.window + 1), past):
                ring[b, :, token % slots] = cache[b, :, token]
        rings.append(guarded(ring, guards))
    return replace(problem, past_key=rings[0], past_value=rings[1], guards=guards)


def assert_ring_holds_new_tokens(ring: Problem, before: Problem, whole: Problem) -> None:
    """Token t lies in slot t mod N (values bit for bit), every other slot is bit for bit as it was."""
    case, slots = ring.case, ring.past_key.shape[2]
    _, present_key, present_value = truth(whole)
    rounding = {"fp16": 2**-10, "bf16": 2**-7, "fp32": 2**-22}[case.dtype] * 4 if case.rotary else 0
    for b, (past, new) in enumerate(case.lengths):
        places = [token % slots for token in range(past, past + new)]
        for now, then, expected, tolerance in ((ring.past_key, before.past_key, present_key, rounding),
                                               (ring.past_value, before.past_value, present_value, 0)):
            error = now[b][:, places].double() - expected[b, :, past: past + new]
            assert (error.abs() <= tolerance).all(), case
            rest = [slot for slot in range(slots) if slot not in places]
            assert torch.equal(now[b][:, rest].nan_to_num(9), then[b][:, rest].nan_to_num(9)), case
    assert_guards(ring.guards)


def coded(problem: Problem, cache: str) -> Problem:
    """The same problem over caches of codes: those of its numbers, and the largest code in what is unspecified."""
    guards: list = []
    kind = {name: dtype for dtype, name in codec.CACHES.items()}[cache]
    caches = []
    for tensor, scale in zip((problem.past_key, problem.past_value), SCALES[cache], strict=True):
        codes = codec.encode(tensor.double().nan_to_num(1e9), scale, kind)
        caches.append(guarded(codes.view(torch.int8), guards).view(kind))
    return replace(problem, past_key=caches[0], past_value=caches[1], guards=guards, scales=SCALES[cache])


def assert_cache_holds_new_codes(problem: Problem, before: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Each new token's code is the one that fp64 gives, or, within 1e-3 of the middle between two (rotation in fp32 and
    the quotient's rounding move it so far at most), the other; every other code is as it was."""
    case, kind = problem.case, problem.past_key.dtype
    held = replace(problem, past_key=before[0].clone(), past_value=before[1].clone())
    _, *presents = truth(held)
    exact = truth(replace(held, scales=None, **{
        name: codec.decode(tensor, scale, torch.float64) for name, tensor, scale in
        zip(("past_key", "past_value"), before, problem.scales, strict=True)}))[1:]
    caches = (problem.past_key, problem.past_value)
    for now, then, codes, numbers, scale in zip(caches, before, presents, exact, problem.scales, strict=True):
        for b, (past, new) in enumerate(case.lengths):
            written = slice(past, past + new)
            found, wanted = now[b, :, written].double(), codes[b, :, written].double()
            quotients = numbers[b, :, written] / torch.tensor(scale).double()
            assert ((found == wanted) | tied(quotients, found, kind)).all(), case
            rest = torch.ones(case.capacity, dtype=torch.bool)
            rest[written] = False
            assert torch.equal(now[b][:, rest].view(torch.int8), then[b][:, rest].view(torch.int8)), case
    assert_guards(problem.guards)


def tied(exact: torch.Tensor, codes: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Whether a code is as near to a number as its step allows, and 1e-3 of the step more."""
    step = torch.ones_like(exact)
    if kind != torch.int8:
        step = torch.ldexp(step, torch.frexp(exact.clamp(-448, 448))[1].clamp(min=-5) - 4)
        exact = exact.clamp(-448, 448)
    return (exact.clamp(-128 if kind == torch.int8 else -448, 127 if kind == torch.int8 else 448) - codes).abs() \
        <= (0.5 + 1e-3) * step


def truth_of_codes(problem: Problem) -> tuple[torch.Tensor, float]:
    """(output in fp64 over the codes that the cache holds now, what a kernel's output may differ from it: twice eager's
    error over the same, plus 1e-6). The new tokens' codes are there already."""
    keys, values = (codec.decode(cache, scale, torch.float64) for cache, scale in
                    zip((problem.past_key, problem.past_value), problem.scales, strict=True))
    silent = replace(problem, key=None, value=None, past_key=keys, past_value=values, scales=None)
    expected, *_ = truth(silent)
    allowed = 2 * (eager(problem, keys, values).double() - expected).nan_to_num().abs().max().item() + 1e-6
    if problem.key is not None:  # rows that a fault makes NaN
        faulty = truth(replace(problem, past_key=problem.past_key.clone(), past_value=problem.past_value.clone()))[0]
        expected = torch.where(faulty.isnan(), faulty, expected)
    return expected, allowed


def truth(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, present_key, present_value) in fp64 from the same rounded inputs."""
    case = problem.case
    wide = [t.double() if t is not None and t.dtype in DTYPES.values() else t for t in problem.tensors()]
    coded = {}
    if problem.scales:
        coded = {"cache_codes": CACHE_CODES[codec.CACHES[problem.past_key.dtype]], "key_scale": problem.scales[0],
                 "value_scale": problem.scales[1]}
    return reference.grouped_query_attention(*wide, **case.attributes, rotary_interleaved=int(case.interleaved),
                                             growing=0, **coded)


def eager(problem: Problem, present_key: torch.Tensor, present_value: torch.Tensor) -> torch.Tensor:
    """Attention in the case's own precision, as `transformers` writes it, over caches given in fp64."""
    case, dtype = problem.case, DTYPES[problem.case.dtype]
    group = case.heads // case.kv_heads
    output = torch.zeros(len(case.lengths), case.steps, case.heads * case.value_head, dtype=dtype)
    for b, (past, new) in enumerate(case.lengths):
        if new == 0:
            continue
        total = past + new
        query = problem.query[b, :new].view(new, case.heads, case.head)
        if problem.cos is not None:
            query = reference.rotate(query[None], problem.cos, problem.sin, past + torch.arange(new)[None],
                                     case.interleaved)[0]
        keys, values = (t[b, :, :total].to(dtype).repeat_interleave(group, 0) for t in (present_key, present_value))
        scores = query.transpose(0, 1) @ keys.transpose(1, 2) * case.head**-0.5
        if case.softcap:
            scores = torch.tanh(scores / case.softcap) * case.softcap
        row, column = past + torch.arange(new)[:, None], torch.arange(total)
        hidden = (column > row) | ((column <= row - case.window) if case.window else torch.zeros_like(column).bool())
        scores = scores.masked_fill(hidden, -torch.inf)
        if problem.sinks is not None:
            scores = torch.cat((scores, problem.sinks[:, None, None].expand(-1, new, 1)), dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)[..., :total]
        output[b, :new] = (weights @ values).transpose(0, 1).reshape(new, -1)
    return output


def assert_close_as_eager(output: torch.Tensor, problem: Problem) -> None:
    """Error against fp64 at most twice eager's, plus 1e-6 for the cases where eager is exact by luck; pads are zero."""
    expected, present_key, present_value = truth(problem)
    allowed = 2 * (eager(problem, present_key, present_value).double() - expected).abs().max().item() + 1e-6
    error = (output.double() - expected).abs().max().item()
    assert error <= allowed, f"{problem.case}: error {error:.3g} against fp64, allowed {allowed:.3g}"
    for b, (_, new) in enumerate(problem.case.lengths):
        assert (output[b, new:] == 0).all(), f"{problem.case}: a padded row of sequence {b} is not zero"
    assert_guards(problem.guards)


def assert_cache_holds_new_tokens(problem: Problem, before_key: torch.Tensor, before_value: torch.Tensor) -> None:
    """New tokens lie at past .. past + new - 1 (values bit for bit), everything else is bit for bit as it was."""
    case = problem.case
    _, present_key, present_value = truth(Problem(case, problem.query, problem.key, problem.value, before_key,
                                                  before_value, *problem.tensors()[5:]))
    rounding = {"fp16": 2**-10, "bf16": 2**-7, "fp32": 2**-22}[case.dtype] * 4 if case.rotary else 0
    for b, (past, new) in enumerate(case.lengths):
        written = slice(max(past, 0), min(past + new, case.capacity))
        for now, then, expected, tolerance in ((problem.past_key, before_key, present_key, rounding),
                                               (problem.past_value, before_value, present_value, 0)):
            assert ((now[b, :, written].double() - expected[b, :, written]).abs() <= tolerance).all(), case
            rest = torch.ones(case.capacity, dtype=torch.bool)
            rest[written] = False
            same = (now[b] == then[b]) | (now[b].isnan() & then[b].isnan())
            assert same[:, rest].all(), f"{case}: sequence {b} changed outside its new tokens"


def pairwise(factors: dict[str, list], seed: int = 0) -> list[dict]:
    """Few rows that hold every pair of values of every two factors at least once (greedy, deterministic)."""
    names, chooser = list(factors), random.Random(seed)
    left = {((a, x), (b, y)) for a, b in itertools.combinations(range(len(names)), 2)
            for x in range(len(factors[names[a]])) for y in range(len(factors[names[b]]))}
    rows = []
    while left:
        first = min(left)
        best, best_count = None, -1
        for _ in range(40):
            row = [chooser.randrange(len(factors[name])) for name in names]
            for index, level in first:
                row[index] = level
            count = sum(row[a] == x and row[b] == y for (a, x), (b, y) in left)
            if count > best_count:
                best, best_count = row, count
        left = {pair for pair in left if not all(best[index] == level for index, level in pair)}
        rows.append({name: factors[name][level] for name, level in zip(names, best, strict=True)})
    return rows
