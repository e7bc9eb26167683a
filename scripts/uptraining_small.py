"""The method of the paper, whole, on a small model: train MHA from scratch, pool to GQA and MQA, uptrain, export.

    python scripts/uptraining_small.py --text FILE --work FOLDER --out docs/benchmarks [--quick]

Bounded to half an hour on two cores; killed, it goes on when run again with the same --work. Byte tokens, so that no
tokenizer is needed. Writes uptraining_small.json, .md and .svg. --quick is the one-minute version for tests.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.conversion.convert import convert
from gqa_export.conversion.options import ConvertOptions
from gqa_export.uptraining.curve import Point, picture
from gqa_export.uptraining.options import UptrainOptions
from gqa_export.uptraining.uptrain import uptrain

ALPHA = 0.05
NAME = "uptraining_small"
VERSIONS = ("torch", "transformers", "accelerate", "onnxruntime")


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. steps: of the pre-training from scratch. ways: method, grouping, and whether the MHA model is
    teacher; what the last way makes is exported for each number of heads (decode speed depends on shapes alone)."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: tuple[int, ...] = (2, 1)
    ways: tuple[tuple[str, str, bool], ...] = (
        ("mean", "contiguous", False), ("mean", "similarity", True), ("calibrated", "similarity", True))
    steps: int = 4000
    length: int = 128
    batch: int = 8
    learning_rate: float = 3e-3
    uptrain_rate: float = 1e-3
    distill_weight: float = 0.9
    calibration_tokens: int = 16384
    eval_rows: int = 256
    prompt: int = 384
    new_tokens: int = 64
    bench_batch: int = 8


QUICK = Plan(hidden=64, ways=(("mean", "contiguous", True), ("calibrated", "similarity", True)), steps=80, length=64,
             uptrain_rate=2e-4, calibration_tokens=4096, eval_rows=32, prompt=32, new_tokens=8, bench_batch=1)


def scratch_model(folder: Path, plan: Plan) -> None:
    """An MHA decoder of Llama's kind with fresh weights, and a byte tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=plan.hidden, intermediate_size=plan.hidden * 11 // 4,
                         num_hidden_layers=plan.layers, num_attention_heads=plan.heads,
                         num_key_value_heads=plan.heads, max_position_embeddings=512, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def trained(source: Path, output: Path, text: Path, plan: Plan, *, fraction: float,
            teacher: Path | None = None) -> dict[str, Any]:
    """Train `fraction` of the pre-training's steps, or read what an earlier start of this script made."""
    if not (output / "gqa_uptrain.json").is_file():
        rate = plan.learning_rate if fraction == 1 else plan.uptrain_rate
        options = UptrainOptions(text=str(text), fraction=fraction, pretraining_steps=plan.steps, length=plan.length,
                                 batch=plan.batch, learning_rate=rate, eval_rows=plan.eval_rows,
                                 teacher=str(teacher or ""), distill_weight=plan.distill_weight)
        uptrain(open_checkpoint(source), output, options)
    return json.loads((output / "gqa_uptrain.json").read_text())


def measured(checkpoint: Path, bundle: Path, plan: Plan) -> dict[str, float]:
    """Cache bytes and decode speed of the exported ONNX model, which is compared with PyTorch first."""
    from gqa_export.bundle.manifest import read_manifest
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx
    from gqa_export.runtime.benchmark import measure
    from gqa_export.validation.validate import validate

    export_onnx(checkpoint, bundle, ExportOptions(cache="static", force=True))
    verdict = validate(bundle, str(checkpoint))
    speed = measure(bundle, prompt_tokens=plan.prompt, new_tokens=plan.new_tokens, batch=plan.bench_batch, repeat=5,
                    threads=1)
    return {"validated": verdict.exit_code == 0, "cache_bytes_per_token": read_manifest(bundle).spec.
            cache_bytes_per_token(4), "decode_tokens_per_s": speed.decode_tokens_per_s,
            "decode_step_ms": speed.decode_step_ms}


def run(text: Path, work: Path, plan: Plan) -> dict[str, Any]:
    """Everything; rows by number of key/value heads, MHA first."""
    import torch

    started, resumed = time.monotonic(), (work / "scratch").exists()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "scratch" / "tokenizer_config.json").is_file():
        scratch_model(work / "scratch", plan)
    part = work / "train.txt"  # calibration must not see what is held out
    whole = text.read_text(encoding="utf-8")
    part.write_text(whole[: int(0.9 * len(whole))], encoding="utf-8")
    base = trained(work / "scratch", work / "mha", text, plan, fraction=1)
    more = trained(work / "mha", work / "mha-more", text, plan, fraction=ALPHA)
    taught = trained(work / "mha", work / "mha-taught", text, plan, fraction=ALPHA, teacher=work / "mha")
    rows: list[dict[str, Any]] = [{"kv_heads": plan.heads, "perplexity": base["perplexity_after"],
                                   "perplexity_with_as_many_more_steps": more["perplexity_after"],
                                   "perplexity_with_as_many_more_steps_taught": taught["perplexity_after"]}]
    curves = {}
    exported = {plan.heads: work / "mha"}
    for kv_heads, (method, grouping, teach) in itertools.product(plan.kv_heads, plan.ways):
        name = f"{kv_heads}-{method}-{grouping}"
        pooled = work / f"pooled-{name}"
        exported[kv_heads] = work / f"uptrained-{name}{'-taught' if teach else ''}"
        if not (pooled / "gqa_convert.json").is_file():
            convert(open_checkpoint(work / "mha"), pooled, ConvertOptions(
                kv_heads=str(kv_heads), method=method, grouping=grouping, text=part, tokens=plan.calibration_tokens))
        report = trained(pooled, exported[kv_heads], text, plan, fraction=ALPHA,
                         teacher=work / "mha" if teach else None)
        curves[f"{kv_heads} key/value heads, {method}, {grouping}{', teacher' if teach else ''}"] = report["held_out"]
        rows.append({"kv_heads": kv_heads, "method": method, "grouping": grouping, "teacher": teach,
                     "perplexity_pooled": report["perplexity_before"], "perplexity": report["perplexity_after"],
                     "steps": report["steps"]})
    bundles = {count: {"kv_heads": count, "exported": source.name, **measured(source, work / f"onnx-{count}", plan)}
               for count, source in exported.items()}
    return {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {platform.system()}, CPU, "
            f"{torch.get_num_threads()} of {os.cpu_count()} cores", "alpha": ALPHA, "plan": vars(plan),
            "versions": {name: version(name) for name in VERSIONS},
            "seconds": None if resumed else round(time.monotonic() - started), "tokens": base["tokens"], "rows": rows,
            "bundles": list(bundles.values()), "pretraining": base["held_out"], "curves": curves}


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    plan, first = report["plan"], report["rows"][0]
    steps = round(report["alpha"] * plan["steps"])

    def against(perplexity: float) -> str:
        return f"{perplexity:.3f} | {100 * (perplexity / first['perplexity'] - 1):+.1f} %"

    lines = [
        "# Uptraining a small model, from scratch to ONNX", "",
        f"{report['date']}, {report['machine']}, shared with other programs; "
        + ", ".join(f"{n} {v}" for n, v in report["versions"].items())
        + (f". {report['seconds'] / 60:.1f} minutes." if report["seconds"] else ". Made in several starts."),
        "", f"Made by `scripts/uptraining_small.py`: a decoder of Llama's kind ({plan['layers']} layers, hidden size "
        f"{plan['hidden']}, {plan['heads']} heads of {plan['hidden'] // plan['heads']}, byte tokens) is trained from "
        f"scratch as MHA for {plan['steps']:,} steps ({report['tokens']:,} tokens, cosine schedule to its end, peak "
        f"learning rate {plan['learning_rate']:g}), pooled, and uptrained for alpha = {report['alpha']:g} of those "
        f"steps ({steps}, peak {plan['uptrain_rate']:g}). `calibrated` reads {plan['calibration_tokens']:,} tokens "
        f"of the training part. Teacher: the MHA model, with weight {plan['distill_weight']:g} in the loss. Perplexity "
        "per byte on the same rows of the held-out tenth of the text throughout.", "",
        "| key/value heads | pooled by | grouping | teacher | perplexity pooled | perplexity uptrained | against MHA |",
        "|---|---|---|---|---|---|---|", f"| {plan['heads']} (MHA) | | | | | {against(first['perplexity'])} |"]
    for name, key in (("no", "perplexity_with_as_many_more_steps"),
                      ("yes", "perplexity_with_as_many_more_steps_taught")):
        lines.append(f"| {plan['heads']}, {steps} more steps | | | {name} | | {against(first[key])} |")
    lines += [f"| {row['kv_heads']} | {row['method']} | {row['grouping']} | {'yes' if row['teacher'] else 'no'} | "
              f"{row['perplexity_pooled']:.3f} | {against(row['perplexity'])} |" for row in report["rows"][1:]]
    lines += ["", f"The exported `ort` bundles: static cache, one thread, batch {plan['bench_batch']}, after "
              f"{plan['prompt']} tokens; validated against the checkpoint.", "",
              "| key/value heads | cache bytes per token | decode tokens/s | ms per step | validated |",
              "|---|---|---|---|---|"]
    lines += [f"| {bundle['kv_heads']} | {bundle['cache_bytes_per_token']:,} | {bundle['decode_tokens_per_s']:,.0f} | "
              f"{bundle['decode_step_ms']:.2f} | {'yes' if bundle['validated'] else 'NO'} |"
              for bundle in report["bundles"]]
    return "\n".join([*lines, "", f"![perplexity during uptraining]({NAME}.svg)", ""])


@click.command()
@click.option("--text", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--work", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--quick", is_flag=True)
def main(text: Path, work: Path, out: Path, quick: bool) -> None:
    """Train, convert, uptrain, export, measure, write the report."""
    report = run(text, work, QUICK if quick else Plan())
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{NAME}.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / f"{NAME}.md").write_text(markdown(report))
    curves = {name: [Point(**point) for point in points] for name, points in report["curves"].items()}
    level = (f"MHA ({report['plan']['heads']})", report["rows"][0]["perplexity"])
    (out / f"{NAME}.svg").write_text(picture("Uptraining after pooling, held-out perplexity", curves, level))
    click.echo(markdown(report))


if __name__ == "__main__":
    main()
