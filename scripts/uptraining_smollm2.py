"""A real model: SmolLM2-135M's key/value heads pooled by every method, and uptrained; perplexity on a held-out text.

    python scripts/uptraining_smollm2.py --checkpoint HF_FOLDER --text FILE --work FOLDER --out docs/benchmarks

The model has 9 query and 3 key/value heads. Expanded to MHA (9, exactly the same function) it is reduced to 3, and
from 3 to 1. Killed, it goes on when run again with the same --work; it takes about half an hour on one core. Writes
uptraining.json, uptraining.md and uptraining.svg.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.tokenized_text import load_tokenizer, packed, read_text, spread, tokenize
from gqa_export.conversion.convert import convert, expand
from gqa_export.conversion.options import ConvertOptions
from gqa_export.uptraining.curve import Point, picture
from gqa_export.uptraining.options import UptrainOptions
from gqa_export.uptraining.uptrain import uptrain

NAME = "uptraining"
HELD_OUT = 0.1
LENGTH, ROWS = 512, 6
CALIBRATION_TOKENS = 3072
WAYS = (("random", "contiguous"), ("first", "contiguous"), ("mean", "contiguous"), ("mean", "similarity"),
        ("svd", "contiguous"), ("calibrated", "contiguous"))
STARTS = ("mean", "calibrated")
UPTRAIN = {"steps": 64, "length": 256, "batch": 2, "learning_rate": 3e-4, "distill_weight": 0.9, "bf16": True,
           "eval_rows": 8, "eval_steps": 16, "save_steps": 16}
VERSIONS = ("torch", "transformers", "accelerate")


def split_text(text: Path, work: Path) -> tuple[Path, Path]:
    """The text's first nine tenths and its last, as files."""
    whole = read_text(text)
    cut = int(len(whole) * (1 - HELD_OUT))
    paths = work / "train.txt", work / "held-out.txt"
    for path, part in zip(paths, (whole[:cut], whole[cut:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return paths


def perplexity(checkpoint: Path, held_out: Path) -> float:
    """e to the mean loss over rows spread over the held-out text."""
    import torch

    opened = open_checkpoint(checkpoint)
    ids = tokenize(load_tokenizer(opened.folder), read_text(held_out))
    rows = torch.from_numpy(spread(packed(ids, LENGTH, str(held_out)), ROWS).astype("int64"))
    model: Any = load_model(opened, "fp32", attn_implementation="sdpa")
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:]).item() for row in rows]
    return math.exp(sum(losses) / len(losses))


def same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bytes."""
    ours, theirs = open_checkpoint(one).tensors, open_checkpoint(other).tensors
    if ours.keys() != theirs.keys():
        return False
    for name in ours:
        with open(ours[name].path, "rb") as first, open(theirs[name].path, "rb") as second:
            first.seek(ours[name].offset)
            second.seek(theirs[name].offset)
            if first.read(ours[name].nbytes) != second.read(theirs[name].nbytes):
                return False
    return True


class Kept:
    """Results that survive a kill: one JSON file, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, name: str, make: Any) -> Any:
        """The value of that name, made if it is not there."""
        if name not in self.values:
            self.values[name] = make()
            self.path.write_text(json.dumps(self.values, indent=1))
            click.echo(f"{name}: {self.values[name]}")
        return self.values[name]


def one_way(source: Path, original: Path, work: Path, texts: tuple[Path, Path], kv_heads: int, way: tuple[str, str],
            known: float) -> dict[str, Any]:
    """Convert one way and measure; a result with the original's very bytes has its perplexity."""
    method, grouping = way
    output = work / f"to-{kv_heads}-{method}-{grouping}"
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    result = convert(open_checkpoint(source), output, ConvertOptions(
        kv_heads=str(kv_heads), method=method, grouping=grouping, text=texts[0], tokens=CALIBRATION_TOKENS))
    seconds = time.perf_counter() - started
    exact = same_weights(output, original)
    errors = [layer.output for layer in result.layers if layer.output is not None]
    row = {"method": method, "grouping": grouping, "kv_heads": kv_heads, "seconds": round(seconds, 1),
           "output_error": sum(errors) / len(errors), "basis": result.layers[0].basis, "same_bytes": exact,
           "perplexity": known if exact else perplexity(output, texts[1])}
    if not (kv_heads == 1 and method in STARTS and grouping == "contiguous"):
        shutil.rmtree(output)
    return row


def trained(work: Path, teacher: Path, texts: tuple[Path, Path], method: str) -> dict[str, Any]:
    """Uptrain the converted checkpoint of one method on the training part; its curve and perplexity."""
    output = work / f"uptrained-{method}"
    if not (output / "gqa_uptrain.json").is_file():
        options: dict[str, Any] = {**UPTRAIN, "text": str(texts[0]), "eval_text": str(texts[1]),
                                   "teacher": str(teacher)}
        uptrain(open_checkpoint(work / f"to-1-{method}-contiguous"), output, UptrainOptions(**options))
    report = json.loads((output / "gqa_uptrain.json").read_text())
    return {"held_out": report["held_out"], "tokens": report["tokens"], "steps": report["steps"],
            "perplexity": perplexity(output, texts[1])}


def run(checkpoint: Path, text: Path, work: Path, starts: tuple[str, ...]) -> dict[str, Any]:
    """Every number of the report; `starts`: the methods after which there is uptraining."""
    work.mkdir(parents=True, exist_ok=True)
    kept, texts = Kept(work / "results.json"), split_text(text, work)
    known = kept.get("source", lambda: perplexity(checkpoint, texts[1]))
    mha = work / "mha"
    rows = []
    for kv_heads, source in ((3, mha), (1, checkpoint)):
        for way in WAYS:
            def make(kv_heads: int = kv_heads, source: Path = source, way: tuple[str, str] = way) -> dict[str, Any]:
                if source == mha and not mha.exists():
                    expand(open_checkpoint(checkpoint), mha, 9)
                return one_way(source, checkpoint, work, texts, kv_heads, way, known)
            rows.append(kept.get(f"{kv_heads} {' '.join(way)}", make))
    shutil.rmtree(mha, ignore_errors=True)
    after = {method: kept.get(f"uptrained {method}", lambda method=method: trained(work, checkpoint, texts, method))
             for method in starts}
    return {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {platform.system()}, CPU",
            "versions": {name: version(name) for name in VERSIONS}, "source": known, "rows": rows,
            "uptrained": after, "settings": {**UPTRAIN, "calibration_tokens": CALIBRATION_TOKENS,
                                             "evaluation_tokens": LENGTH * ROWS}}


def order_of(rows: list[dict[str, Any]]) -> str:
    """Where the order calibrated < svd <= mean < first < random of perplexities holds and where not, in words."""
    plain = {row["method"]: row["perplexity"] for row in rows if row["grouping"] == "contiguous"}
    pairs = (("calibrated", "svd", False), ("svd", "mean", True), ("mean", "first", False), ("first", "random", False))
    tied = [row["method"] for row in rows if row["same_bytes"]]
    if tied:
        return f"all but random tie: {', '.join(dict.fromkeys(tied))} give the original back bit for bit"
    wrong = [f"{a} {'<=' if equal else '<'} {b} fails ({plain[a]:,.1f} and {plain[b]:,.1f})" for a, b, equal in pairs
             if not (plain[a] <= plain[b] if equal else plain[a] < plain[b])]
    return "the order calibrated < svd <= mean < first < random holds" if not wrong else "; ".join(wrong)


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    settings, known = report["settings"], report["source"]
    lines = ["# SmolLM2-135M with fewer key/value heads", "",
             f"{report['date']}, {report['machine']} (shared with other programs, one thread); "
             + ", ".join(f"{name} {number}" for name, number in report["versions"].items()) + ".", "",
             "Made by `scripts/uptraining_smollm2.py`. The model (9 query heads, 3 key/value heads) has perplexity "
             f"{known:.2f} per token on {settings['evaluation_tokens']:,} tokens spread over the held-out last tenth "
             f"of the text; `calibrated` uses {settings['calibration_tokens']:,} tokens of the rest. Output error: "
             "mean over layers of the relative error of the attention output, from weights, or on activations for "
             "`calibrated`."]
    titles = {3: "Expanded to MHA, 9 -> 3", 1: "3 -> 1 (9 -> 3 -> 1 meets it: `mean` gives the original back)"}
    for kv_heads, title in titles.items():
        rows = [row for row in report["rows"] if row["kv_heads"] == kv_heads]
        lines += ["", f"## {title}", "", "| method | grouping | output error | perplexity | seconds |",
                  "|---|---|---|---|---|"]
        lines += [f"| {row['method']} | {row['grouping']} | {row['output_error']:.3f} ({row['basis']}) | "
                  f"{row['perplexity']:,.2f}{' (the same bytes)' if row['same_bytes'] else ''} | {row['seconds']:.0f} |"
                  for row in rows]
        lines += ["", f"By perplexity, {order_of(rows)}."]
    lines += ["", "A perplexity above 49,152, the size of the vocabulary, is worse than guessing: up there the order "
              "says little, and no method that looks at weights alone survives 3 -> 1 in this model."]
    lines += ["", "## 3 -> 1, uptrained", "", f"{settings['steps']} steps of {settings['batch']} rows of "
              f"{settings['length']} tokens on the training part, peak learning rate {settings['learning_rate']:g}, "
              f"bf16, the original as teacher with weight {settings['distill_weight']:g} in the loss. "
              "Recovered: the part of the loss (in nats) that pooling cost and uptraining won back.", "",
              "| pooled by | tokens | perplexity pooled | perplexity uptrained | recovered |", "|---|---|---|---|---|"]
    for method, after in report["uptrained"].items():
        before = next(row["perplexity"] for row in report["rows"]
                      if row["kv_heads"] == 1 and (row["method"], row["grouping"]) == (method, "contiguous"))
        won = math.log(before / after["perplexity"]) / math.log(before / known)
        lines.append(f"| {method} | {after['tokens']:,} | {before:,.2f} | {after['perplexity']:,.2f} | {won:.0%} |")
    lines += ["", report["note"]] if report.get("note") else []
    return "\n".join([*lines, "", f"![perplexity during uptraining]({NAME}.svg)", ""])


@click.command()
@click.option("--checkpoint", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--text", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--work", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--uptrain-after", "starts", type=click.Choice(STARTS), multiple=True, default=STARTS, show_default=True)
def main(checkpoint: Path, text: Path, work: Path, out: Path, starts: tuple[str, ...]) -> None:
    """Convert, measure, uptrain, write the report."""
    report = run(checkpoint, text, work, starts)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{NAME}.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / f"{NAME}.md").write_text(markdown(report))
    curves = {f"pooled by {method}": [Point(**point) for point in after["held_out"]]
              for method, after in report["uptrained"].items()}
    (out / f"{NAME}.svg").write_text(picture("SmolLM2-135M, 3 -> 1 key/value heads, uptrained", curves,
                                             ("the original", report["source"])))
    click.echo(markdown(report))


if __name__ == "__main__":
    main()
