"""Decode of 24-layer hybrids on the CPU through our session: time per token at 128, 1024 and 8192 tokens of past, and
onnxruntime-genai's own bundle of the same checkpoint beside it where its builder takes the model.

    python scripts/benchmark_hybrid_decode.py --scratch FOLDER --out docs/benchmarks

Weights are random (shapes: models/shapes.toml). Of the second shape a decoder is timed beside it whose layers all keep
states of fixed size, which shows what those layers cost at any length. All run in one process, one step of each in
turn, one thread each. Writes hybrid_decode.json and hybrid_decode.md; takes some minutes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import gqa_models
import numpy as np

import gqa_export as gqa
from gqa_export.runtime.generate import PREFILL_PIECE
from gqa_export.runtime.open_session import open_bundle

LENGTHS = (128, 1024, 8192)
STEPS = 48
"""timed at each length, the first few left out"""
WARM = 4
PEERED, OTHER = "lfm2-24l", "qwen3.5-24l"
PEER = "onnxruntime-genai builder"
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


class Ours:
    """A bundle of ours in our session, greedy."""

    def __init__(self, checkpoint: Path, bundle: Path) -> None:
        gqa.export(checkpoint, bundle, cache="static", capacity=LENGTHS[-1] + STEPS + PREFILL_PIECE, dtype="fp32",
                   provider="cpu")
        self._session = open_bundle(bundle, "cpu", threads=1)
        self._session.reset(1)
        self.tokens: list[int] = []

    def feed(self, ids: list[int]) -> None:
        """A prompt, or more of it; nothing of it is timed."""
        for start in range(0, len(ids), PREFILL_PIECE):
            logits = self._session.step(np.array([ids[start : start + PREFILL_PIECE]], np.int64)).logits
        self._next = int(logits[0, -1].argmax())

    def step(self) -> None:
        """One token."""
        self.tokens.append(self._next)
        self._next = int(self._session.step(np.array([[self._next]], np.int64)).logits[0, -1].argmax())


class Peer:
    """The same checkpoint as the peer's builder exports it, in the peer's own runtime, greedy."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        import onnxruntime_genai as genai

        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(folder),
                   "-p", "fp32", "-e", "cpu", "-c", str(folder.parent / "cache")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        config = json.loads((folder / "genai_config.json").read_text())
        config["model"]["decoder"]["session_options"].update(intra_op_num_threads=1)
        config["model"]["eos_token_id"] = []
        (folder / "genai_config.json").write_text(json.dumps(config))
        model = genai.Model(str(folder))
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=LENGTHS[-1] + STEPS + PREFILL_PIECE, do_sample=False)
        self._generator = genai.Generator(model, params)
        self.tokens: list[int] = []

    def feed(self, ids: list[int]) -> None:
        """As of Ours."""
        for start in range(0, len(ids), PREFILL_PIECE):
            self._generator.append_tokens(np.array([ids[start : start + PREFILL_PIECE]], np.int32))

    def step(self) -> None:
        """As of Ours: a token is chosen and its logits are computed."""
        self._generator.generate_next_token()
        self.tokens.append(int(self._generator.get_next_tokens()[0]))


def timed(step: Callable[[], None]) -> float:
    """Milliseconds of one step."""
    began = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - began)


def measure(runners: dict[str, Any], vocabulary: int) -> list[dict[str, Any]]:
    """Median step of each runner at each length, and the first one's speed as a share of the second's."""
    random, rows, past = np.random.default_rng(0), [], 0
    for length in LENGTHS:
        more = random.integers(4, vocabulary, length - past).tolist()
        for runner in runners.values():
            runner.feed(more)
        steps: dict[str, list[float]] = {name: [] for name in runners}
        for number in range(WARM + STEPS):
            for name in sorted(runners, reverse=bool(number % 2)):
                steps[name].append(timed(runners[name].step))
        past = length + WARM + STEPS
        row: dict[str, Any] = {"past": length}
        for name, found in steps.items():
            quarter = statistics.quantiles(found[WARM:], n=4)
            row[name] = {"median_ms": round(statistics.median(found[WARM:]), 2),
                         "quartiles_ms": [round(quarter[0], 2), round(quarter[2], 2)]}
        if PEER in steps:
            ours = next(name for name in steps if name != PEER)
            row["ratio"] = round(row[PEER]["median_ms"] / row[ours]["median_ms"], 3)
            row["ratio_pairs"] = round(statistics.median(
                b / a for a, b in zip(steps[ours][WARM:], steps[PEER][WARM:])), 3)
            row["same_tokens"] = runners[ours].tokens == runners[PEER].tokens
        rows.append(row)
        click.echo(json.dumps(row))
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The figures as a page."""
    lines = ["# Decode of hybrids", "",
             f"{result['date']}, {result['machine']}, ONNX Runtime {result['versions']['onnxruntime']}, fp32, batch 1, "
             f"one thread each. Median of {STEPS} greedy steps (quartiles), one step of each decoder in turn in one "
             f"process. Load average at the end: {result['load_average']}; where it is high, steps compare only with "
             "those beside them. Random weights; shapes in `models/shapes.toml`. Made by "
             "`scripts/benchmark_hybrid_decode.py`.",
             ""]
    for table in result["tables"]:
        names = [name for name in table["rows"][0] if isinstance(table["rows"][0][name], dict)]
        peer = PEER in names
        lines += [f"## {table['what']}", "",
                  "| past | " + " | ".join(f"{name}, ms" for name in names)
                  + (" | speed of ours / of theirs | median over pairs of steps | same tokens |" if peer else " |"),
                  "|---" * (1 + len(names) + 3 * peer) + "|"]
        for row in table["rows"]:
            cells = [f"{row[name]['median_ms']} ({row[name]['quartiles_ms'][0]} - {row[name]['quartiles_ms'][1]})"
                     for name in names]
            if peer:
                cells += [str(row["ratio"]), str(row["ratio_pairs"]), "yes" if row["same_tokens"] else "no"]
            lines.append(f"| {row['past']} | {' | '.join(cells)} |")
        lines.append("")
    lines += [line for note in result.get("notes", ()) for line in (note, "")]
    return "\n".join(lines)


@click.command()
@click.option("--scratch", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
def main(scratch: Path, out: Path) -> None:
    """Measure, print and write the result."""
    shutil.rmtree(scratch, ignore_errors=True)
    checkpoint = write_checkpoint(PEERED, scratch / "peered")
    vocabulary = gqa_models.shape(PEERED)["vocab_size"]
    runners: dict[str, Any] = {"gqa-export": Ours(checkpoint, scratch / "peered-ours"),
                               PEER: Peer(checkpoint, scratch / "peered-theirs")}
    tables = [{"what": "LFM2's kind: 16 layers of convolutions, 8 of attention",
               "rows": measure(runners, vocabulary)}]
    runners.clear()
    whole = Ours(write_checkpoint(OTHER, scratch / "other"), scratch / "other-ours")
    states = Ours(write_checkpoint(OTHER, scratch / "states", layer_types=["linear_attention"] * 24),
                  scratch / "states-ours")
    tables.append({"what": "Qwen3.5's kind: 18 layers of linear attention and 6 of attention, and 24 of linear "
                           "attention",
                   "rows": measure({"18 and 6": whole, "24 and none": states}, vocabulary)})
    shutil.rmtree(scratch)
    result = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
              "versions": {name: version(name) for name in VERSIONS},
              "load_average": round(os.getloadavg()[0], 1),
              "shapes": {name: gqa_models.shape(name) for name in (PEERED, OTHER)}, "tables": tables}
    out.mkdir(parents=True, exist_ok=True)
    (out / "hybrid_decode.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "hybrid_decode.md").write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
