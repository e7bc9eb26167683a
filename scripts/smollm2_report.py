"""The real model, measured: SmolLM2-135M in fp32 through every target and cache, against PyTorch.

    python scripts/smollm2_report.py --checkpoint MODEL.gguf --out docs/benchmarks

For ort, onnx and portable, growing and static: `validate` (prefill and 32 decode steps, ragged batch included), 128
greedy tokens against transformers' `generate`, node counts; for ort also through onnxruntime-genai, and with linked
weights. Writes smollm2.json and smollm2.md. The result carries a hash of every graph's structure, made from the
configuration alone, so that a test can tell when the graphs have changed since.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import gqa_models
import numpy as np

from gqa_export.checkpoint.load_model import load_model
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx

PROMPT = "Explain in a few sentences why the sky is blue."
NEW_TOKENS = 128
STEPS = 32
TARGETS, CACHES = ("ort", "onnx", "portable"), ("growing", "static")
CAPACITY = 1024


def structures() -> dict[str, Any]:
    """Node count and structural hash of each graph of SmolLM2, from its shape alone: no weights, no checkpoint."""
    from evidence.output_hashes import output_hashes
    from transformers import AutoConfig

    from gqa_export.lowering.context import LowerOptions
    from gqa_export.lowering.lower import lower
    from gqa_export.trace.tracing import trace

    shape = gqa_models.shape("smollm2")
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    found = {}
    for cache in CACHES:
        traced = trace(config, dtype="float32", cache=cache, capacity=CAPACITY)
        for target in TARGETS:
            for packed in (True, False) if target == "ort" else (True,):
                graph = lower(traced.model, traced.spec, LowerOptions(target, cache, CAPACITY, packed=packed)).model
                hashes = json.dumps(output_hashes(graph), sort_keys=True)
                name = f"{target} {cache}" + ("" if packed else " zero-copy")
                found[name] = {"nodes": len(graph.graph.node), "functions": len(graph.functions),
                               "structure": hashlib.sha256(hashes.encode()).hexdigest()}
    return found


@dataclass(frozen=True)
class Truth:
    """The prompt's ids and transformers' greedy continuations: end tokens like any other, and end tokens forbidden
    (which is how onnxruntime-genai goes on past them)."""

    prompt: list[int]
    greedy: list[int]
    endless: list[int]


def truth_tokens(checkpoint: Path) -> Truth:
    """What transformers' `generate` says."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    from gqa_export.checkpoint.open import open_checkpoint

    opened = open_checkpoint(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(opened.folder, gguf_file=opened.gguf_file and opened.gguf_file.name,
                                              local_files_only=True, trust_remote_code=False)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True,
                                           return_dict=False)
    model: Any = load_model(opened, "float32")
    end = model.config.eos_token_id
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    found = []
    for options in ({"eos_token_id": None}, {"eos_token_id": end, "min_new_tokens": NEW_TOKENS}):
        config = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=end, **options)
        with torch.no_grad():
            # A mask of ones: generate would hide the prompt's own end tokens where they are the padding token too.
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        found.append(out[0, len(prompt):].tolist())
    return Truth(list(prompt), *found)


def our_tokens(bundle: Path, prompt: list[int]) -> tuple[list[int], float]:
    """The bundle's greedy continuation and its tokens per second (end tokens not honoured, as in the truth)."""
    from gqa_export.runtime.generate import generate
    from gqa_export.runtime.ort.session import OrtSession

    result = generate(OrtSession.load(bundle), [prompt], NEW_TOKENS, [])
    return result.tokens[0], result.tokens_per_s


def genai_tokens(bundle: Path, prompt: list[int]) -> list[int]:
    """The same through onnxruntime-genai, the bundle unchanged."""
    import onnxruntime_genai as genai

    params = genai.GeneratorParams(model := genai.Model(str(bundle)))
    params.set_search_options(do_sample=False, max_length=len(prompt) + NEW_TOKENS,
                              min_length=len(prompt) + NEW_TOKENS)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    for _ in range(NEW_TOKENS):
        generator.generate_next_token()
    return list(map(int, generator.get_sequence(0)[len(prompt):]))


def measure(checkpoint: Path, folder: Path, target: str, cache: str, truth: Truth) -> dict:
    """Export, validate and let one bundle speak."""
    from gqa_export.validation.validate import validate

    began = time.perf_counter()
    export = export_onnx(checkpoint, folder, ExportOptions(target=target, cache=cache, dtype="fp32",
                                                           capacity=CAPACITY))
    exported = time.perf_counter()
    verdict = validate(folder, checkpoint, steps=STEPS, check_hashes=False)
    tokens, speed = our_tokens(folder, truth.prompt)
    logits = {case.name: max(kind.max_abs for kind in case.kinds if kind.kind == "logits") for case in verdict.cases
              if case.name != "refusals"}  # which compares nothing
    row = {"target": target, "cache": cache, "nodes": export.nodes, "export_s": round(exported - began, 1),
           "validate_s": round(time.perf_counter() - exported, 1), "passed": verdict.exit_code == 0,
           "max_logit_difference": max(logits.values()), "cases": logits,
           "same_tokens": _same(tokens, truth.greedy), "tokens_per_s": round(speed, 1)}
    if target == "ort" and cache == "growing":
        row["same_tokens_through_genai"] = _same(genai_tokens(folder, truth.prompt), truth.endless)
    return row


def _same(tokens: list[int], expected: list[int]) -> int:
    """How many of the first tokens are the same."""
    return next((i for i, (a, b) in enumerate(zip(tokens, expected)) if a != b), min(len(tokens), len(expected)))


def markdown(report: dict) -> str:
    """The report as a page."""
    lines = ["# SmolLM2-135M-Instruct, fp32, on a CPU", "",
             f"{report['date']}, {report['machine']}; " + ", ".join(f"{k} {v}" for k, v in report["versions"].items())
             + ".", "", "Made by `scripts/smollm2_report.py`. The largest logit difference is against PyTorch in fp64 "
             f"over prefill and {STEPS} decode steps, all cases of `validate` (ragged batch of three included). "
             f"Same tokens: how many of {NEW_TOKENS} greedy tokens equal transformers' `generate`.", "",
             "| target | cache | nodes | passed | max logit difference | same tokens | through onnxruntime-genai |",
             "|---|---|---|---|---|---|---|"]
    for row in report["bundles"]:
        lines.append(f"| {row['target']} | {row['cache']} | {row['nodes']} | {'yes' if row['passed'] else 'NO'} | "
                     f"{row['max_logit_difference']:.2e} | {row['same_tokens']} | "
                     f"{row.get('same_tokens_through_genai', '')} |")
    lines += ["", "Nodes of each graph, from the model's shape alone:", "", "| graph | nodes | functions |",
              "|---|---|---|"]
    lines += [f"| {name} | {row['nodes']} | {row['functions']} |" for name, row in report["structures"].items()]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--checkpoint", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
def main(checkpoint: Path, out: Path) -> None:
    """Measure and write the report."""
    truth = truth_tokens(checkpoint)
    rows = []
    for target in TARGETS:
        for cache in CACHES:
            with tempfile.TemporaryDirectory() as scratch:
                rows.append(measure(checkpoint, Path(scratch) / "bundle", target, cache, truth))
            click.echo(json.dumps(rows[-1]))
    report = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {platform.system()}, CPU",
              "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime",
                                                            "onnxruntime-genai", "onnxscript")},
              "prompt": PROMPT, "bundles": rows, "structures": structures()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "smollm2.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "smollm2.md").write_text(markdown(report))
    raise SystemExit(0 if all(row["passed"] and row["same_tokens"] == NEW_TOKENS for row in rows) else 1)


if __name__ == "__main__":
    main()
