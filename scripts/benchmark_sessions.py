"""What sessions save on a CPU: ragged chunks of four rows in one call, and guesses that are checked several at once.

    python scripts/benchmark_sessions.py --checkpoint MODEL.gguf --out docs/benchmarks

SmolLM2-135M in fp32 on one thread. `--ragged-chunks`: four rows over pasts of different lengths bring chunks of
different lengths, in one call and as four calls of one row each, for a growing and a static cache; the answers must be
the same. `--speculate ngram`: the same greedy tokens with and without, on prompts whose answers repeat their text; the
speeds are those of decoding alone. Everything takes turns in one process. Writes sessions.json and sessions.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

import gqa_export as gqa
from gqa_export.runtime.generate import generate
from gqa_export.runtime.open_session import open_bundle
from gqa_export.runtime.speculation import Draft, ngram

CAPACITY = 1024
PASTS = (64, 200, 120, 16)
CHUNKS = {"few tokens": (2, 4, 3, 1), "more tokens": (4, 7, 2, 5), "pieces of prompts": (48, 33, 64, 20)}
"""new tokens of each row: guesses to check, and pieces in which prompts join; of the last the session runs the rows one
by one, because they would be padding for the most part"""
TURNS = 7
NEW_TOKENS = 96
TEXT = (
    "The lighthouse at Cape Ferret was built in 1840 and rebuilt in 1947 after the war. It stands 53 metres "
    "tall, and its red lamp can be seen from 27 miles away. Visitors climb 258 steps to the top, from where "
    "they can see the bay of Arcachon, the ocean and the great dune of Pilat. The museum on the ground floor "
    "shows how the keepers lived, how lamps changed from oil to electricity, and why the coast is dangerous "
    "to ships.")
PROMPTS = {
    "summarise": "Summarise the following text.\n\n" + TEXT,
    "extract": "List the facts of the following text, in its own words.\n\n" + TEXT,
    "unrelated": "Write a short story about a cat and a clock.",
}
"""the last one is what guessing is of no use for"""
VERSIONS = ("onnxruntime", "numpy")


def settings() -> str:
    """A digest of what is measured: results of another are stale."""
    facts = [CAPACITY, PASTS, CHUNKS, TURNS, NEW_TOKENS, PROMPTS]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def chat(folder: Path, prompt: str) -> list[int]:
    """A prompt as the model's template has it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return list(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                              return_dict=False))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of CPU, and what the call gave."""
    began = time.process_time()
    found = call()
    return 1e3 * (time.process_time() - began), found


def count_calls(session: Any) -> list[int]:
    """A list that grows with every call of the session's graph, by its rows."""
    calls: list[int] = []
    backend, run = session._backend, session._backend.run

    def noting(feed: Any, *rest: Any) -> Any:
        calls.append(len(feed["input_ids"]))
        return run(feed, *rest)

    backend.run = noting
    return calls


def chunk_times(together: Any, alone: Any, counts: tuple[int, ...]) -> dict[str, Any]:
    """One call against four. together: a session whose graph takes ragged chunks; alone: one whose rows run singly."""
    random = np.random.default_rng(3)
    rows = len(PASTS)
    prompt = random.integers(3, together.spec.vocabulary, (rows, max(PASTS)))
    ids, new = random.integers(3, together.spec.vocabulary, (rows, max(counts))), np.array(counts)
    for session in (together, alone):
        session.reset(rows)
        session.step(prompt, np.array(PASTS))
    times: dict[str, list[float]] = {"with": [], "without": []}
    calls = {name: count_calls(session) for name, session in (("with", together), ("without", alone))}
    apart = 0.0
    for _ in range(TURNS):
        answers = []
        for name, session in (("with", together), ("without", alone)):
            spent, step = timed(lambda session=session: session.step(ids, new))
            times[name].append(spent)
            answers.append(step.logits)
            for row, length in enumerate(PASTS):
                session.rewind_row(row, length)
        apart = max(apart, *(float(np.abs(answers[0][b, :n] - answers[1][b, :n]).max()) for b, n in enumerate(counts)))
    found = {name: statistics.median(values) for name, values in times.items()}
    return {**found, "with_calls": len(calls["with"]) // TURNS, "without_calls": len(calls["without"]) // TURNS,
            "ratio": found["with"] / found["without"], "largest_difference": apart}


def speculation(session: Any, folder: Path, name: str) -> dict[str, Any]:
    """Decoding with guesses against decoding without, in turn."""
    ids, ends = chat(folder, PROMPTS[name]), session.manifest.tokens["eos"]
    draft = Draft(ngram, session.manifest.verify_width)
    runs: dict[str, list[Any]] = {"plain": [], "ngram": []}
    for _ in range(3):
        runs["plain"].append(generate(session, [ids], NEW_TOKENS, ends))
        runs["ngram"].append(generate(session, [ids], NEW_TOKENS, ends, draft=draft))
    speeds = {kind: statistics.median(one.tokens_per_s for one in found) for kind, found in runs.items()}
    guessed = runs["ngram"][0]
    return {"prompt_tokens": len(ids), "new_tokens": len(guessed.tokens[0]), **speeds,
            "ratio": speeds["ngram"] / speeds["plain"], "steps": guessed.decode_steps, "drafted": guessed.drafted,
            "accepted": guessed.accepted,
            "same_tokens": all(one.tokens == runs["plain"][0].tokens for found in runs.values() for one in found)}


def page(data: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Sessions: one call for ragged chunks, and speculation", "",
        f"By `scripts/benchmark_sessions.py`, {data['date']}: {data['checkpoint']} in fp32, one thread of "
        f"{data['cores']} cores ({data['machine']}), ONNX Runtime {data['versions']['onnxruntime']}.", "",
        "## Ragged chunks of four rows", "",
        f"Rows with {', '.join(map(str, PASTS))} tokens in the cache bring chunks; milliseconds of CPU of a step, the "
        f"median of {TURNS}, with `--ragged-chunks` and without, where every row is a call.", "",
        "| cache | new tokens of the rows | with: calls | with | without: calls | without | ratio | largest difference "
        "of logits |", "|---|---|---|---|---|---|---|---|"]
    for cache, kinds in data["chunks"].items():
        for kind, found in kinds.items():
            lines.append(f"| {cache} | {', '.join(map(str, CHUNKS[kind]))} | {found['with_calls']} | "
                         f"{found['with']:.0f} | {found['without_calls']} | {found['without']:.0f} | "
                         f"{found['ratio']:.2f} | {found['largest_difference']:.1e} |")
    lines += [
        "", "## `--speculate ngram`", "",
        f"At most {NEW_TOKENS} new tokens of a chat, at most {data['verify_width']} tokens a step; tokens per second "
        "of decoding. The tokens are the same with and without guesses.", "",
        "| prompt | new tokens | plain | with guesses | ratio | steps | guesses accepted |",
        "|---|---|---|---|---|---|---|"]
    lines += [f"| {name} | {found['new_tokens']} | {found['plain']:.1f} | {found['ngram']:.1f} | "
              f"{found['ratio']:.2f} | {found['steps']} | {found['accepted']} of {found['drafted']} |"
              for name, found in data["speculation"].items()]
    return "\n".join([*lines, ""])


@click.command()
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("docs/benchmarks"))
def main(checkpoint: Path, out: Path) -> None:
    """Measure, and write sessions.json and sessions.md."""
    data: dict[str, Any] = {
        "settings": settings(), "date": date.today().isoformat(), "machine": platform.machine(),
        "cores": os.cpu_count(), "checkpoint": checkpoint.stem, "chunks": {}, "speculation": {},
        "versions": {name: version(name) for name in VERSIONS}}
    with tempfile.TemporaryDirectory(prefix="gqa-sessions-") as place:
        for cache in ("growing", "static"):
            sessions = []
            for ragged in (True, False):
                made = gqa.export(checkpoint, Path(place) / f"{cache}-{ragged}", cache=cache, capacity=CAPACITY,
                                  dtype="fp32", quantize="dequantize", provider="cpu", ragged_chunks=ragged)
                sessions.append(open_bundle(made.folder, "cpu", threads=1))
            data["chunks"][cache] = {kind: chunk_times(*sessions, counts) for kind, counts in CHUNKS.items()}
            click.echo(data["chunks"][cache])
        data["verify_width"] = made.manifest.verify_width
        for name in PROMPTS:
            data["speculation"][name] = speculation(sessions[-1], made.folder, name)
            click.echo(f"{name}: {data['speculation'][name]}")
    (out / "sessions.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (out / "sessions.md").write_text(page(data), encoding="utf-8")


if __name__ == "__main__":
    main()
