"""An engine bundle of the toy model (toy_model.h), written by the project's own classes, and what the toy answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gqa_export.bundle.engine_facts import ENGINE, EngineFacts, PluginFacts, ProfileFacts
from gqa_export.bundle.manifest import MANIFEST, FileFact, Manifest
from gqa_export.bundle.parallel import HeldHeads, ParallelFacts, RankFacts, order_sha256, rank_folder
from gqa_export.graph_io import TensorFact
from gqa_export.spec import ModelSpec, WindowCache

LAYERS, CAPACITY, VOCABULARY, BATCH, PROMPT, HEAD = 2, 16, 50, 3, 4, 2
WINDOW = 3
"""of the last layer, where it keeps a ring of WINDOW + PROMPT slots"""
CACHE = [f".{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]


def tensors(dtype: str, hidden: bool = False, heads: int = 1, ring: bool = False,
            codes: str = "") -> tuple[tuple[TensorFact, ...], tuple[TensorFact, ...]]:
    """(inputs, outputs), as `graph_io` names them. ring: the last layer's cache is one. codes: type of the cache."""
    def row(tail: str) -> tuple[str | int, ...]:
        return ("batch", heads, WINDOW + PROMPT if ring and tail.startswith(f".{LAYERS - 1}.") else CAPACITY, HEAD)

    inputs = (TensorFact("input_ids", "int32", ("batch", "sequence")), TensorFact("past_lengths", "int32", ("batch",)),
              TensorFact("new_lengths", "int32", ("batch",)),
              *(TensorFact(f"past_key_values{tail}", codes or dtype, row(tail)) for tail in CACHE))
    states = (TensorFact("hidden_states", dtype, ("batch", "sequence", 3)),) if hidden else ()
    outputs = (TensorFact("logits", dtype, ("batch", 1, VOCABULARY)), *states,
               *(TensorFact(f"present{tail}", codes or dtype, row(tail)) for tail in CACHE))
    return inputs, outputs


def profile(name: str, steps: int, batch: int = BATCH) -> ProfileFacts:
    def shapes(rows: int, length: int) -> dict[str, tuple[int, ...]]:
        known = {"batch": rows, "sequence": length}
        return {fact.name: tuple(known.get(axis, axis) for axis in fact.shape) for fact in tensors("float16")[0]}

    low, high = shapes(1, 1), shapes(batch, steps)
    return ProfileFacts(name, {each: (low[each], low[each], high[each]) for each in low})


def engine_facts(plugin: bool = False, batch: int = BATCH) -> EngineFacts:
    fact = PluginFacts("GroupedQueryAttention", "1", "gqa", 1, "0" * 64) if plugin else None
    return EngineFacts("tensorrt", "11.1.0.106", (80, 89), "plugin" if plugin else "native",
                       (profile("decode", 1, batch), profile("prefill", PROMPT, batch)),
                       {f"present{tail}": f"past_key_values{tail}" for tail in CACHE}, fact, LAYERS if plugin else 0)


def manifest(facts: EngineFacts, dtype: str = "float16", engine: bytes = b"",
             rope_switch: int = 0, hidden: bool = False, ring: bool = False, codes: str = "") -> Manifest:
    inputs, outputs = tensors(dtype, hidden, ring=ring, codes=codes)
    spec = ModelSpec("toy", "Toy", VOCABULARY, 3 if hidden else 8, CAPACITY, "", (), rope_switch=rope_switch)
    return Manifest(target="trt-plugin", dtype=dtype, cache="static", capacity=CAPACITY, logits="last", weights="copy",
                    spec=spec, inputs=inputs, outputs=outputs,
                    files={ENGINE: FileFact(len(engine), hashlib.sha256(engine).hexdigest())},
                    tokens={"eos": [2, 7], "bos": 1, "pad": None}, engine=facts,
                    window_cache=WindowCache(PROMPT, (LAYERS - 1,)) if ring else None)


def write_bundle(folder: Path, *, plugin: bool = False, dtype: str = "float16",
                 facts: EngineFacts | None = None) -> Path:
    """A folder with an engine that the stand-in for TensorRT opens, and its manifest."""
    folder.mkdir(parents=True)
    engine = f"toy {CAPACITY} {VOCABULARY} {BATCH} {PROMPT} {dtype}".encode()
    (folder / ENGINE).write_bytes(engine)
    made = manifest(facts or engine_facts(plugin), dtype, engine)
    (folder / MANIFEST).write_text(made.to_json(), encoding="utf-8")
    return folder


def rank_manifest(ranks: int, engines: Sequence[bytes] = (), held: int = 2, dtype: str = "float32",
                  orders: Sequence[str] = ()) -> Manifest:
    """Of a toy that is cut over ranks, each of which holds `held` heads. orders: a rank's collectives."""
    whole = manifest(engine_facts(), dtype)
    inputs, outputs = tensors(dtype, heads=ranks * held)
    facts = tuple(RankFacts(rank_folder(r), tuple(HeldHeads(layer, r, 1, tuple(range(r * held, (r + 1) * held)))
                                                  for layer in range(LAYERS)),
                            order_sha256((orders[r] if orders else "one",))) for r in range(ranks))
    engines = engines or [b""] * ranks
    files = {f"{rank_folder(r)}/{ENGINE}": FileFact(len(data), hashlib.sha256(data).hexdigest())
             for r, data in enumerate(engines)}
    return replace(whole, inputs=inputs, outputs=outputs, files=files,
                   parallel=ParallelFacts(facts, ("all_reduce sum",), "whole", {}))


def write_rank_bundle(folder: Path, ranks: int, held: int = 2, dtype: str = "float32") -> Path:
    """A folder with an engine for each rank that the stand-in for TensorRT opens."""
    engines = [f"toy {CAPACITY} {VOCABULARY} {BATCH} {PROMPT} {dtype} {r + 1} {held}".encode() for r in range(ranks)]
    for r, data in enumerate(engines):
        (folder / rank_folder(r)).mkdir(parents=True)
        (folder / rank_folder(r) / ENGINE).write_bytes(data)
    (folder / MANIFEST).write_text(rank_manifest(ranks, engines, held, dtype).to_json(), encoding="utf-8")
    return folder


def answer(tokens: Sequence[int], ranks: int = 0, ring: bool = False) -> int:
    """What the toy says after these tokens: every layer's sum over the cache, a ring's over its window, and the length.
    Rank r of several has r + 1 times the sum."""
    if ring:
        return ((sum(tokens) * (LAYERS - 1) + sum(tokens[-WINDOW:])) * 7 + len(tokens)) % VOCABULARY
    return (LAYERS * sum(tokens) * 7 * (ranks * (ranks + 1) // 2 or 1) + len(tokens)) % VOCABULARY


def continued(prompt: Sequence[int], most: int, ends: Sequence[int] = (2, 7), ranks: int = 0) -> list[int]:
    """What `generate` returns for a prompt."""
    read, written = list(prompt), []
    while len(written) < most:
        written.append(answer(read, ranks))
        if written[-1] in ends:
            break
        read.append(written[-1])
    return written
