"""Predict what equal shares of the whole batch do to decode, from bytes and latencies. Nothing is measured: no GPU.

    python scripts/decode_shares.py      -> docs/benchmarks/decode_shares.json, .md

The model: an SM holds two programs; a program works through its tiles one after the other, a tile every LATENCY_CLOCKS
at best (its loads are that far apart when nothing else wants the memory), all programs together at the bandwidth of
MEMORY at best; a program that ends makes room for the next one in the grid. Beginning a program costs START_S, the read
of a length and the first loads among it. Of equal shares, to find the own one costs FIND_S more (about 400 clocks: two
looks at lengths that are in the L1 cache by then, four sums over threads, two divisions), and each further part of a
share PART_S (a tile's latency until its first loads are there, and the stores of the part before). The launches of
append and combine are the same in both and are left out. How work is divided is the kernels' own arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

OUT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
NAME = "decode_shares"
TILE_KEYS, TILE_BYTES = 64, 64 * 2 * 128 * 2  # keys and values of 64 positions, head size 128, bf16
KV_HEADS = 8
LATENCY_CLOCKS = 1050
START_S, FIND_S, PART_S = 1.5e-6, 0.25e-6, 0.75e-6
MOST_SPLITS = 128  # of one sequence, when each sequence was split by itself

RAGGED = "1 x 128k + 15 x 1k"
BATCHES: dict[str, tuple[int, ...]] = {
    "16 x 32k": (32768,) * 16, "1 x 32k": (32768,), "1 x 128k": (131072,), "4 x 8k": (8192,) * 4,
    "64 x 8k": (8192,) * 64, "17 x 8k": (8192,) * 17, "34 x 8k": (8192,) * 34,
    RAGGED: (131072, *(1024,) * 15), "1 x 128k + 63 x 1k": (131072, *(1024,) * 63),
    "4 x 32k + 28 x 2k": (*(32768,) * 4, *(2048,) * 28), "1k, 2k .. 32k": tuple(1024 * n for n in range(1, 33)),
}
UNIFORM = tuple(name for name, lengths in BATCHES.items() if len(set(lengths)) == 1)


@dataclass(frozen=True)
class Card:
    """sms, clock (Hz), and the bandwidth of a copy (bytes/s) that is expected of it."""

    sms: int
    clock: float
    bandwidth: float


MEMORY = Card(132, 1.7e9, 3.0e12)


def tiles_of(lengths: Iterable[int]) -> list[int]:
    """Tiles that each sequence sees."""
    return [-(-length // TILE_KEYS) for length in lengths]


def choose_splits(sequences: int, keys: int, slots: int, least_keys: int) -> int:
    """Before: how many programs shared one sequence and head, from numbers that the host knows."""
    works = sequences * KV_HEADS
    most = min(MOST_SPLITS, max(1, keys // least_keys), -(-slots // works))
    filling = [works * n / slots / -(-works * n // slots) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(filling, 1) if share >= 0.95 * max(filling))


def by_sequence(lengths: tuple[int, ...], slots: int, least_keys: int) -> list[tuple[int, float]]:
    """(tiles, seconds before its first) of each program of the grid in order, each sequence split by itself."""
    splits = choose_splits(len(lengths), max(lengths), slots, least_keys)
    programs = []
    for tiles in tiles_of(lengths):
        share = -(-tiles // splits)
        programs += [(max(0, min(share, tiles - n * share)), START_S) for n in range(splits)] * KV_HEADS
    return programs


def by_batch(lengths: tuple[int, ...], programs: int, least_keys: int) -> list[tuple[int, float]]:
    """The same for equal shares of the whole batch: `decode_kernel`'s arithmetic."""
    tiles = tiles_of(lengths)
    every = sum(tiles) * KV_HEADS
    share = max(-(-every // programs), -(-least_keys // TILE_KEYS))
    works = [count for count in tiles for _ in range(KV_HEADS)]
    ends, total = [], 0
    for count in works:
        total += count
        ends.append(total)
    found = []
    for program in range(programs):
        begin, end = program * share, min((program + 1) * share, every)
        parts = sum(stop - count < end and begin < stop for stop, count in zip(ends, works, strict=True))
        found.append((max(0, end - begin), START_S + FIND_S + PART_S * max(0, parts - 1)))
    return found


def seconds(programs: list[tuple[int, float]], card: Card) -> float:
    """Until the last program has ended: programs run `2 x SMs` at a time, and share the bandwidth."""
    slots, alone = 2 * card.sms, card.clock / LATENCY_CLOCKS
    waiting = list(reversed(programs))
    running: list[tuple[float, float]] = []  # (seconds before its first tile, tiles)
    clock = 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            tiles, start = waiting.pop()
            running.append((start, tiles))
        loading = sum(start <= 0 for start, _ in running)
        rate = min(alone, card.bandwidth / (TILE_BYTES * max(1, loading)))
        step = min(start if start > 0 else tiles / rate for start, tiles in running)
        clock += step
        after = [(start - step, tiles) if start > 0 else (0.0, tiles - step * rate) for start, tiles in running]
        running = [(start if start > 1e-12 else 0.0, tiles) for start, tiles in after if start > 1e-12 or tiles > 1e-6]
    return clock


def predict(card: Card = MEMORY) -> list[dict[str, Any]]:
    """A row per batch: microseconds and the share of the bandwidth, before and now."""
    from gqa_plugins.grouped_attention import plan

    rows = []
    for name, lengths in BATCHES.items():
        least = sum(lengths) * KV_HEADS * TILE_BYTES / TILE_KEYS / card.bandwidth
        slots = card.sms * plan.BLOCKS_PER_SM
        programs = plan.choose_programs(len(lengths), KV_HEADS, 1, max(lengths), card.sms)
        before = seconds(by_sequence(lengths, slots, plan.LEAST_KEYS), card)
        now = seconds(by_batch(lengths, programs, plan.LEAST_KEYS), card)
        rows.append({"batch": name, "ideal_us": least * 1e6, "before_us": before * 1e6, "now_us": now * 1e6,
                     "before": least / before, "now": least / now, "of_before": before / now})
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """The prediction as Markdown."""
    lines = ["# Decode: equal shares of the whole batch, predicted", "",
             "Made by `scripts/decode_shares.py`. Nothing here was measured: this is a model of bytes and latencies "
             f"for a card of {MEMORY.sms} SMs that copies {MEMORY.bandwidth / 1e12:.1f} TB/s (an H100), {KV_HEADS} "
             "key/value heads, head size 128, bf16. Before, each sequence was split by itself; now the tiles of all "
             "sequences are divided. Shares are of the bandwidth: 100 % is the time that the bytes of the cache alone "
             "need.", "",
             "| batch | bytes alone, µs | before, µs | now, µs | before | now | speed of before |", "|---" * 7 + "|"]
    lines += [f"| {row['batch']} | {row['ideal_us']:.0f} | {row['before_us']:.0f} | {row['now_us']:.0f} | "
              f"{row['before']:.0%} | {row['now']:.0%} | {row['of_before']:.1%} |" for row in rows]
    return "\n".join(lines) + "\n"


@click.command()
def main() -> None:
    """Write the prediction."""
    rows = predict()
    report = {"card": asdict(MEMORY), "rows": rows}
    (OUT / f"{NAME}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (OUT / f"{NAME}.md").write_text(page(rows), encoding="utf-8")
    click.echo(page(rows))


if __name__ == "__main__":
    main()
