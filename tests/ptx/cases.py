"""The runs that continuous integration makes on the interpreter, and random ones for the sweep."""

from __future__ import annotations

import random

from .attention import Case, Run

CAPABILITIES = (80, 89, 90, 120)
PER_KERNELS = 6


def _case(heads: int, kv_heads: int, head: int, dtype: str, steps: int, capacity: int,
          lengths: tuple[tuple[int, int], ...], **more: object) -> Case:
    value_head = more.pop("value_head", head)
    return Case(lengths, steps, capacity, heads, kv_heads, head, value_head, dtype, **more)  # type: ignore[arg-type]


RUNS: dict[str, Run] = {
    "decode, 8.0, three lengths, one empty":
        Run(_case(8, 2, 64, "bf16", 1, 200, ((150, 1), (0, 1), (63, 0))), 80, "decode", 3),
    "decode, 9.0, head size 256, full capacity":
        Run(_case(4, 1, 256, "bf16", 1, 129, ((128, 1), (64, 1))), 90, "decode"),
    "decode, 8.9, head size 256, window across a tile's edge":
        Run(_case(4, 1, 256, "bf16", 1, 129, ((128, 1), (31, 1)), window=33), 89, "decode"),
    "decode, 12.0, group 8":
        Run(_case(8, 1, 128, "bf16", 1, 97, ((96, 1), (95, 1))), 120, "decode"),
    "decode, 8.0, head size 1":
        Run(_case(3, 1, 1, "bf16", 1, 37, ((36, 1), (15, 1))), 80, "decode"),
    "decode, 8.0, odd head sizes, two steps":
        Run(_case(3, 1, 7, "fp16", 2, 37, ((35, 2), (15, 1)), value_head=5), 80, "decode"),
    "decode, 8.9, group 17 in a tile of 32, window of a tile":
        Run(_case(17, 1, 72, "bf16", 1, 65, ((64, 1), (63, 1)), window=64), 89, "decode"),
    "decode, 8.0, group 71, window 1":
        Run(_case(71, 1, 64, "fp16", 1, 70, ((65, 1),), window=1), 80, "decode", 1),
    "decode, 8.0, fp32, soft cap, sinks":
        Run(_case(4, 1, 64, "fp32", 1, 70, ((65, 1), (0, 1)), softcap=30.0, sinks=True), 80, "decode", 3),
    "decode, 9.0, fp32, head size 128":
        Run(_case(4, 1, 128, "fp32", 1, 70, ((65, 1), (31, 1))), 90, "decode"),
    "decode, 9.0, more programs than tiles":
        Run(_case(2, 1, 16, "bf16", 1, 70, ((69, 1), (0, 1)), sinks=True), 90, "decode", 128),
    "decode, 9.0, more sequences than are counted at a time":
        Run(_case(2, 1, 16, "bf16", 1, 40, (*((b % 7 * 5, b % 3 % 2) for b in range(65)), (39, 1))), 90, "decode", 3),
    "decode, 12.0, window of the largest integer":
        Run(_case(4, 2, 64, "fp16", 1, 64, ((63, 1), (0, 1)), window=2**31 - 1), 120, "decode"),
    "decode, 8.0, another layer's cache, rotated queries":
        Run(_case(4, 2, 64, "bf16", 2, 64, ((20, 2), (0, 1)), rotary=32), 80, "decode", has_new=False),
    "prefill, 9.0, head size 128, two row tiles, window":
        Run(_case(4, 1, 128, "bf16", 33, 200, ((150, 33), (0, 33)), window=70), 90, "prefill"),
    "prefill, 9.0, head size 256":
        Run(_case(4, 1, 256, "bf16", 35, 99, ((64, 35),), window=40), 90, "prefill"),
    "prefill, 9.0, values narrower than keys, sinks":
        Run(_case(8, 1, 192, "bf16", 20, 70, ((50, 20), (0, 3)), value_head=128, sinks=True), 90, "prefill"),
    "prefill, 9.0, soft cap, all of a head rotated":
        Run(_case(9, 3, 64, "bf16", 33, 80, ((31, 33),), softcap=15.0, rotary=64), 90, "prefill"),
    "prefill, 9.0, fp16, group 5, soft cap, sinks":
        Run(_case(5, 1, 80, "fp16", 27, 140, ((113, 27),), softcap=20.0, sinks=True), 90, "prefill"),
    "prefill, 8.0, narrow heads":
        Run(_case(2, 1, 20, "fp16", 17, 65, ((48, 17),), value_head=12), 80, "prefill"),
    "prefill, 8.0, fp32, window, neighbours rotated":
        Run(_case(4, 2, 40, "fp32", 9, 70, ((61, 9), (0, 2)), window=17, rotary=40, interleaved=True), 80, "prefill"),
    "prefill, 8.9, head size 128":
        Run(_case(4, 2, 128, "fp16", 40, 130, ((90, 40), (0, 0))), 89, "prefill"),
    "prefill, 12.0, head size 64, part of a head rotated":
        Run(_case(6, 2, 64, "bf16", 45, 130, ((64, 45), (85, 45)), rotary=16, interleaved=True), 120, "prefill"),
    "prefill, 12.0, every new token the first":
        Run(_case(4, 4, 96, "bf16", 34, 34, ((0, 34), (0, 1)), value_head=48), 120, "prefill"),
}


def random_run(number: int) -> Run:
    """The run of this number: the same for ever. Small, over everything that the kernels take.

    PER_KERNELS runs in a row have the same kernels, whose compilation takes longer than a run.
    """
    choose, chance = random.Random(f"kernels {number // PER_KERNELS}").choice, random.Random(f"run {number}")
    capability, kind = choose((80, 80, 89, 90, 90, 120)), choose(("decode", "decode", "prefill"))
    dtype = choose(("bf16", "bf16", "fp16", "fp32"))
    head = choose((1, 2, 8, 12, 16, 24, 33, 40, 64, 72, 96, 112, 128, 160, 192, 256))
    if dtype == "fp32":
        head = min(head, 128)
    value_head = choose((head, head, head, 8, 48, 100, 128))
    group, has_new = choose((1, 2, 3, 5, 7, 8, 12, 16, 20, 33)), choose((True,) * 6 + (False,))
    window, softcap, sinks = choose((0, 0, 1)), choose((0, 0, 1)), choose((False, False, True))
    rotary = choose((0, 0, head // 2 * 2, head // 4 * 2))
    interleaved = rotary > 0 and choose((False, True))

    steps = chance.choice((1, 1, 2, 3, 5, 15, 16, 17, 31))
    steps = 1 if group * steps > 300 else steps
    capacity = max(steps, chance.choice((17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 190)))
    lengths = []
    for _ in range(chance.choice((1, 2, 3))):
        new = chance.choice((steps, steps, chance.randint(0, steps)))
        lengths.append((chance.choice((capacity - new, chance.randint(0, capacity - new), 0)), new))
    kv_heads = chance.choice((1, 1, 2, 3))
    case = Case(tuple(lengths), steps, capacity, kv_heads * group, kv_heads, head, value_head, dtype,
                window=window * chance.choice((1, 2, 15, 16, 17, 31, 33, 64, 65, capacity, capacity + 1)),
                softcap=softcap * chance.choice((5.0, 30.0)), sinks=sinks, rotary=rotary, interleaved=interleaved,
                seed=number)
    return Run(case, capability, kind, chance.choice((1, 2, 3, 7, 17)), has_new)
