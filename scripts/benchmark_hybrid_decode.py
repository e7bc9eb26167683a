"""Decode of 24-layer hybrids on the CPU through our session: time per token at 128, 1024 and 8192 tokens of past, and
onnxruntime-genai's own bundle of the same checkpoint beside it where its builder takes the model.

    python scripts/benchmark_hybrid_decode.py --scratch FOLDER --out docs/benchmarks
    python scripts/benchmark_hybrid_decode.py --scratch FOLDER --out docs/benchmarks --only narrow

Weights are random (shapes: models/shapes.toml). The shape that genai's builder takes is timed at a second, smaller
width, where what a step costs beside its matrices weighs more. Of the other shape a decoder is timed beside it whose
layers all keep states of fixed size, which shows what those layers cost at any length. All runners of a table run in
one process, one step of each in turn, one thread each. Where a session's weights come to lie in memory moves its speed
by more than what is measured; so there are several rounds (`evidence.decode_in_turn`). Speeds are compared by the time
on a core. Writes hybrid_decode.json and hybrid_decode.md, with `--only` the other tables as they are there; takes some
minutes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import gqa_models
from evidence.decode_in_turn import PEER, STEPS, Pair, for_one_thread, rounds, speeds

import gqa_export as gqa
from gqa_export.runtime.generate import PREFILL_PIECE

LENGTHS = (128, 1024, 8192)
ROUNDS = 4
"""processes in which both sides of the comparison are opened anew; beyond MANY tokens the first one is all"""
MANY = 1024
PEERED, OTHER = "lfm2-24l", "qwen3.5-24l"
NARROW = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
"""what is changed in the shape PEERED for the smaller width; heads stay as wide"""
OURS = "gqa-export"
ROOM = LENGTHS[-1] + STEPS + PREFILL_PIECE
VERSIONS = ("torch", "transformers", "onnxruntime", "onnxruntime-genai")


def write_checkpoint(name: str, folder: Path, **changes: Any) -> Path:
    """A random checkpoint of a shape, with a tokenizer of one word an id (the peer's builder wants one)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    values = {**gqa_models.shape(name), **changes}
    gqa_models.save_random(AutoConfig.for_model(**values), folder)
    vocabulary = {f"w{number}": number for number in range(values["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2",
                            pad_token="w3").save_pretrained(folder)
    return folder


def make_ours(checkpoint: Path, bundle: Path) -> Path:
    """Our bundle of a checkpoint."""
    gqa.export(checkpoint, bundle, cache="static", capacity=ROOM, dtype="fp32", provider="cpu")
    return bundle


def make_theirs(checkpoint: Path, folder: Path) -> Path:
    """The same checkpoint as the peer's builder exports it, for one thread."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(folder),
               "-p", "fp32", "-e", "cpu", "-c", str(folder.parent / "cache")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return for_one_thread(folder)


def measure(bundles: dict[str, Path], vocabulary: int, lengths: Sequence[int] = LENGTHS,
            count: int = 1) -> list[dict[str, Any]]:
    """A row for each length, of so many rounds that have a process each."""
    few = [[length for length in lengths if not number or length <= MANY] for number in range(count)]
    done = rounds(bundles, vocabulary, few, ROOM, click.echo)
    return [row(length, [one for one in done if str(length) in one["steps"]]) for length in lengths]


def row(length: int, done: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and quartiles over all rounds; where the peer is among them, our speed as a share of its."""
    made: dict[str, Any] = {"past": length}
    steps = [one["steps"][str(length)] for one in done]
    for name in steps[0]:
        clock, core = zip(*(pair for one in steps for pair in one[name]))
        quarter = statistics.quantiles(clock, n=4)
        made[name] = {"median_ms": round(statistics.median(clock), 2),
                      "quartiles_ms": [round(quarter[0], 2), round(quarter[2], 2)],
                      "core_ms": round(statistics.median(core), 2)}
    if PEER in steps[0]:
        each = speeds(steps, OURS, PEER)  # far apart: a median over all pairs would be that of some rounds
        made |= {"ratio": round(statistics.geometric_mean(each), 3), "ratio_clock": _clock(steps),
                 "ratio_rounds": each, "same_tokens": all(one["same"] for one in done)}
    click.echo(json.dumps(made))
    return made


def _clock(steps: list[dict[str, list[Pair]]]) -> float:
    """Median over all pairs of steps of our speed as a share of theirs, on the clock."""
    return round(statistics.median(theirs[0] / ours[0] for one in steps
                                   for ours, theirs in zip(one[OURS], one[PEER])), 3)


def markdown(result: dict[str, Any]) -> str:
    """The figures as a page."""
    lines = ["# Decode of hybrids", "",
             f"{result['date']}, {result['machine']}, ONNX Runtime {result['versions']['onnxruntime']}, fp32, batch 1, "
             f"one thread each. Median of {STEPS} greedy steps (quartiles), one step of each decoder in turn in one "
             "process: on the clock, and the time of this process on a core, without waiting for one. "
             "Speeds are compared by the latter: the median over pairs of steps in each round, and the geometric mean "
             "of the rounds; beside it the median over all pairs on the clock. "
             "Where weights come to lie in memory moves a session's speed by several per cent: against the peer there "
             f"were {ROUNDS} rounds, each in a process of its own where one side and the other is opened first in "
             f"turn, beyond {MANY} tokens one. Random weights; shapes in "
             "`models/shapes.toml`. Made by `scripts/benchmark_hybrid_decode.py`.",
             ""]
    for table in result["tables"]:
        names = [name for name in table["rows"][0] if isinstance(table["rows"][0][name], dict)]
        peer = PEER in names
        lines += [f"## {table['what']}", "",
                  "| past | " + " | ".join(f"{name}, ms | of it on a core" for name in names)
                  + (" | our speed / theirs | on the clock | of each round | same tokens |" if peer else " |"),
                  "|---" * (1 + 2 * len(names) + 4 * peer) + "|"]
        for row in table["rows"]:
            cells = [f"{row[name]['median_ms']} ({row[name]['quartiles_ms'][0]} - {row[name]['quartiles_ms'][1]}) | "
                     f"{row[name].get('core_ms', '-')}" for name in names]
            if peer:
                cells += [str(row["ratio"]), str(row["ratio_clock"]), ", ".join(map(str, row["ratio_rounds"])),
                          "yes" if row["same_tokens"] else "no"]
            lines.append(f"| {row['past']} | {' | '.join(cells)} |")
        lines += ["", f"Load average: {table['load_average']}."
                  + ("" if all("core_ms" in row[name] for row in table["rows"] for name in names) else
                     " An older run, one round and on the clock alone."), ""]
    return "\n".join(lines)


def peered(scratch: Path, lengths: Sequence[int] = LENGTHS, **changes: Any) -> list[dict[str, Any]]:
    """The rows of our session beside the peer, for the shape that the peer's builder takes."""
    checkpoint = write_checkpoint(PEERED, scratch / "checkpoint", **changes)
    return measure({OURS: make_ours(checkpoint, scratch / "ours"), PEER: make_theirs(checkpoint, scratch / "theirs")},
                   gqa_models.shape(PEERED)["vocab_size"], lengths, ROUNDS)


def beside_states(scratch: Path) -> list[dict[str, Any]]:
    """The rows of a decoder with and without layers of attention."""
    whole = write_checkpoint(OTHER, scratch / "other")
    states = write_checkpoint(OTHER, scratch / "states", layer_types=["linear_attention"] * 24)
    return measure({"18 and 6": make_ours(whole, scratch / "other-ours"),
                    "24 and none": make_ours(states, scratch / "states-ours")}, gqa_models.shape(OTHER)["vocab_size"])


TABLES: dict[str, tuple[str, Callable[[Path], list[dict[str, Any]]]]] = {
    "wide": ("LFM2's kind: 16 layers of convolutions, 8 of attention", peered),
    "narrow": ("The same at a width of 512 instead of 768",
               lambda scratch: peered(scratch, LENGTHS[:2], **NARROW)),
    "states": ("Qwen3.5's kind: 18 layers of linear attention and 6 of attention, and 24 of linear attention",
               beside_states),
}


@click.command()
@click.option("--scratch", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--only", multiple=True, type=click.Choice(list(TABLES)), help="A table; the others stay as they are.")
def main(scratch: Path, out: Path, only: tuple[str, ...]) -> None:
    """Measure, print and write the result."""
    file = out / "hybrid_decode.json"
    kept = {table["name"]: table for table in json.loads(file.read_text(encoding="utf-8"))["tables"]} if only else {}
    for name, (what, rows) in TABLES.items():
        if not only or name in only:
            shutil.rmtree(scratch, ignore_errors=True)
            kept[name] = {"name": name, "what": what, "rows": rows(scratch),
                          "load_average": round(os.getloadavg()[0], 1)}
    shutil.rmtree(scratch)
    result = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
              "versions": {name: version(name) for name in VERSIONS},
              "shapes": {name: gqa_models.shape(name) for name in (PEERED, OTHER)}, "narrow": NARROW,
              "tables": [kept[name] for name in TABLES]}
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "hybrid_decode.md").write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
