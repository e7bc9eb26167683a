"""The method of the paper, whole, on a small model: train MHA from scratch, pool to GQA and MQA, uptrain, export.

    python scripts/uptraining_small.py --text FILE --work FOLDER --out docs/benchmarks [--quick]

Bounded to half an hour on two cores; killed, it goes on when run again with the same --work. Byte tokens, so that no
tokenizer is needed. Writes uptraining_small.json, .md and .svg. --quick is the one-minute version for tests.
"""

from __future__ import annotations

import itertools
import json
import platform
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from gqa_export.checkpoint import open_checkpoint
from gqa_export.convert import ConvertOptions, convert
from gqa_export.uptrain import UptrainOptions, uptrain
from gqa_export.uptrain.curve import Point, picture

ALPHA = 0.05
NAME = "uptraining_small"
VERSIONS = ("torch", "transformers", "accelerate", "onnxruntime")


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. steps: of the pre-training from scratch."""

    hidden: int = 128
    layers: int = 4
    heads: int = 8
    kv_heads: tuple[int, ...] = (4, 1)
    methods: tuple[str, ...] = ("mean", "calibrated")
    steps: int = 1200
    length: int = 128
    batch: int = 16
    learning_rate: float = 3e-3
    uptrain_rate: float = 1e-3
    eval_rows: int = 256
    prompt: int = 384
    new_tokens: int = 64
    bench_batch: int = 8


QUICK = Plan(hidden=64, layers=2, heads=4, kv_heads=(2, 1), methods=("mean",), steps=80, length=64, batch=8,
             eval_rows=32, prompt=32, new_tokens=8, bench_batch=1)


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
                                 teacher=str(teacher or ""))
        uptrain(open_checkpoint(source), output, options)
    return json.loads((output / "gqa_uptrain.json").read_text())


def measured(checkpoint: Path, bundle: Path, plan: Plan) -> dict[str, float]:
    """Cache bytes and decode speed of the exported ONNX model, which is compared with PyTorch first."""
    from gqa_export.bundle import read_manifest
    from gqa_export.pipeline import ExportOptions, export_onnx
    from gqa_export.run.measure import measure
    from gqa_export.validation import validate

    export_onnx(checkpoint, bundle, ExportOptions(cache="static", force=True))
    verdict = validate(bundle, str(checkpoint))
    speed = measure(bundle, prompt_tokens=plan.prompt, new_tokens=plan.new_tokens, batch=plan.bench_batch, repeat=5,
                    threads=1)
    return {"validated": verdict.exit_code == 0, "cache_bytes_per_token": read_manifest(bundle).spec.
            cache_bytes_per_token(4), "decode_tokens_per_s": speed.decode_tokens_per_s,
            "decode_step_ms": speed.decode_step_ms}


def run(text: Path, work: Path, plan: Plan) -> dict[str, Any]:
    """Everything; rows by number of key/value heads, MHA first."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "scratch" / "tokenizer_config.json").is_file():
        scratch_model(work / "scratch", plan)
    part = work / "train.txt"  # calibration must not see what is held out
    part.write_text(text.read_text(encoding="utf-8")[: int(0.9 * len(text.read_text(encoding="utf-8")))])
    base = trained(work / "scratch", work / "mha", text, plan, fraction=1)
    more = trained(work / "mha", work / "mha-more", text, plan, fraction=ALPHA)
    rows: list[dict[str, Any]] = [{
        "kv_heads": plan.heads, "perplexity": base["perplexity_after"], "perplexity_with_as_many_more_steps":
        more["perplexity_after"], **measured(work / "mha", work / "mha-onnx", plan)}]
    curves = {}
    for kv_heads, method in itertools.product(plan.kv_heads, plan.methods):
        name = f"{kv_heads}-{method}"
        pooled, done = work / f"pooled-{name}", work / f"uptrained-{name}"
        if not (pooled / "gqa_convert.json").is_file():
            convert(open_checkpoint(work / "mha"), pooled,
                    ConvertOptions(kv_heads=str(kv_heads), method=method, text=part))
        report = trained(pooled, done, text, plan, fraction=ALPHA, teacher=work / "mha")
        curves[f"{kv_heads} key/value heads, {method}"] = report["held_out"]
        rows.append({"kv_heads": kv_heads, "method": method, "perplexity_pooled": report["perplexity_before"],
                     "perplexity": report["perplexity_after"], "steps": report["steps"],
                     **measured(done, work / f"onnx-{name}", plan)})
    return {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {platform.system()}, CPU",
            "versions": {name: version(name) for name in VERSIONS}, "plan": vars(plan), "alpha": ALPHA,
            "tokens": base["tokens"], "rows": rows, "curves": curves}


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    plan, first = report["plan"], report["rows"][0]
    lines = [
        "# Uptraining a small model, from scratch to ONNX", "",
        f"{report['date']}, {report['machine']}; " + ", ".join(f"{n} {v}" for n, v in report["versions"].items()) + ".",
        "", f"Made by `scripts/uptraining_small.py`: a decoder of Llama's kind ({plan['layers']} layers, hidden size "
        f"{plan['hidden']}, {plan['heads']} heads, byte tokens) is trained from scratch as MHA for {plan['steps']} "
        f"steps ({report['tokens']:,} tokens), pooled, and uptrained for alpha = {report['alpha']:g} of "
        "those steps with the MHA model as teacher. Perplexity per byte on the held-out tenth of the text. MHA "
        f"trained for as many steps more comes to {first['perplexity_with_as_many_more_steps']:.3f}. Decode: the "
        f"exported `ort` bundle, static cache, one thread, batch {plan['bench_batch']}, after {plan['prompt']} tokens; "
        "other programs shared the machine.", "",
        "| key/value heads | pooled by | perplexity pooled | perplexity uptrained | against MHA | cache bytes per "
        "token | decode tokens/s | validated |", "|---|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        pooled, against = row.get("perplexity_pooled"), 100 * (row["perplexity"] / first["perplexity"] - 1)
        before = "" if pooled is None else f"{pooled:.3f}"
        lines.append(f"| {row['kv_heads']} | {row.get('method', '')} | {before} | {row['perplexity']:.3f} | "
                     f"{against:+.1f} % | {row['cache_bytes_per_token']:,} | "
                     f"{row['decode_tokens_per_s']:,.0f} | {'yes' if row['validated'] else 'NO'} |")
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
