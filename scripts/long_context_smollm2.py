"""What approximate attention costs SmolLM2-135M on a text: loss, copying, layers; writes docs/benchmarks.

    python scripts/long_context_smollm2.py --checkpoint MODEL --text FILE --out docs/benchmarks [--only ROW,ROW]
    python scripts/long_context_smollm2.py --draw docs/benchmarks   # page and picture again, from the committed result

Everything runs in PyTorch in fp32 on one thread. Rows of one length share one exact run, and a run starts at the first
layer that is approximated. A result that is there already is kept, and only rows that it lacks are measured. Nothing of
a text or a model is written but figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gqa_export.checkpoint.load_config import load_config
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.compare.long_quality import LengthQuality, LongQuality
from gqa_export.exporting.long_plan import LongOptions
from gqa_export.long_attention_op import LongSetting
from gqa_export.long_context.attention import load
from gqa_export.long_context.choose import choose
from gqa_export.long_context.layers import LayerWatch
from gqa_export.long_context.measure import Measurement, Sequence, text_tokens
from gqa_export.trace.probe.layer_probe import probe

HYPER = LongSetting("hyper", heavy_keys=256, samples=256)
TILES = LongSetting("tiles", heavy_keys=640, samples=219)
COPY = LongSetting("tiles", leaf=512, heavy_keys=320, samples=109, score_rows=16)

LEAST_DRAWN = 0.001
"""nats; what is below is drawn there"""


@dataclass(frozen=True)
class Row:
    """One measurement. last: layers, counted from the end; 0: chosen by bounds. loss, copy: what is demanded, in nats
    at the most; layers: at least so many are chosen. fails: the report must fail by its default bounds and say why."""

    name: str
    tokens: int
    setting: LongSetting
    last: int
    loss: float | None = None
    copy: float | None = None
    layers: int = 0
    score: float | None = None
    fails: bool = False


ROWS = (
    Row("copy-tiles-15", 4096, COPY, 15, copy=1.1),
    Row("hyper-5", 8192, HYPER, 5, loss=0.01),
    Row("tiles-15", 8192, TILES, 15, loss=0.04),
    Row("hyper-15", 8192, HYPER, 15, loss=0.08),
    Row("tiles-30", 8192, TILES, 30, loss=0.04),
    Row("hyper-30", 8192, HYPER, 30, loss=0.11),
    Row("tiles-5", 8192, TILES, 5, loss=0.04),
    Row("published-5", 8192, LongSetting("hyper", heavy_keys=256, samples=256, anchors=0), 5),
    Row("published-15", 8192, LongSetting("hyper", heavy_keys=256, samples=256, anchors=0), 15, fails=True),
    Row("auto-tiles", 4096, COPY, 0, layers=10, score=0.95),
)


def broken(row: Row, found: dict[str, Any]) -> list[str]:
    """Which demands a result does not meet."""
    wrong = []
    if row.loss is not None and not found["loss"] <= row.loss:
        wrong.append(f"{row.name}: loss {found['loss']:.4f}, at most {row.loss}")
    if row.copy is not None and not found["copy"] <= row.copy:
        wrong.append(f"{row.name}: {found['copy']:.3f} nats on the copy, at most {row.copy}")
    if row.layers and not len(found["layers"]) >= row.layers:
        wrong.append(f"{row.name}: {len(found['layers'])} layers, at least {row.layers}")
    if row.score is not None and not (found["copy_score"] or 0.0) >= row.score:
        wrong.append(f"{row.name}: copy score {found['copy_score']}, at least {row.score}")
    if row.fails and not ("--max-loss" in (told := " ".join(found["failures"])) and "alpha of layer" in told):
        wrong.append(f"{row.name}: the report says {found['failures']}, expected a loss beyond the bound, and alpha")
    return wrong


def reported(row: Row, layers: tuple[int, ...], found: LengthQuality) -> list[str]:
    """What `gqa-export long` says of a result, by its default bounds."""
    usual = LongOptions()
    return list(LongQuality("", "", row.setting.method, row.setting.attributes(), 0, layers, usual.max_loss,
                            usual.min_copy, (found,)).failures)


def page(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = ["# Approximate attention in SmolLM2-135M", "",
             "Nats per token behind the first leaf, against the same model with exact attention; perplexity is the "
             "natural exponential. Copy: nats on a passage that is repeated at the end of the context, with what the "
             "exact model has there and what it has when the passage is new. PyTorch, fp32, on a text of plays.", "",
             "Made by `scripts/long_context_smollm2.py`.", "",
             "| row | tokens | method | leaf | heavy | samples | anchors | layers | perplexity (exact) | nats lost | "
             "KL | top-1 | copy (exact, new) | copy score |", "|" + 14 * "---|"]
    for row in ROWS:
        found = results.get(row.name)
        if found is None:
            continue
        setting, score = row.setting, found["copy_score"]
        lines.append(
            f"| {row.name} | {row.tokens} | {setting.method} | {setting.leaf} | {setting.heavy_keys} | "
            f"{setting.samples} | {setting.anchors} | {len(found['layers'])} | {found['perplexity']:.2f} "
            f"({found['exact_perplexity']:.2f}) | {found['loss']:+.4f} | {found['kl']:.4f} | {found['top1']:.3f} | "
            f"{found['copy']:.2f} ({found['exact_copy']:.2f}, {found['unseen']:.2f}) | "
            f"{'not judged' if score is None else f'{score:.2f}'} |")
    for row in ROWS:
        for failure in results.get(row.name, {}).get("failures", []):
            lines += ["", f"The report of {row.name} fails by its default bounds: {failure}."]
    return "\n".join(lines) + "\n"


def write(place: Path) -> None:
    """Page and picture of a result, beside it."""
    results = json.loads(place.read_text())
    place.with_suffix(".md").write_text(page(results))
    place.with_suffix(".svg").write_text(picture(results))


def picture(results: dict[str, Any]) -> str:
    """Loss over the number of layers, the last ones of them, at 8192 tokens."""
    sys.path.insert(0, str(Path(__file__).parent))
    from chart import Axis, Line, chart

    families = {"hyper as published": (HYPER, 0), "hyper, 4 anchors": (HYPER, 4), "tiles": (TILES, 4)}
    lines = []
    for name, (setting, anchors) in families.items():
        found = sorted((len(result["layers"]), max(result["loss"], LEAST_DRAWN)) for row in ROWS
                       if (result := results.get(row.name)) is not None and row.tokens == 8192
                       and row.setting == replace(setting, anchors=anchors))
        lines += [Line(name, found)] if found else []
    return chart("SmolLM2-135M, 8192 tokens: nats lost over the layers that are approximated",
                 Axis("last layers, of 30", (5, 10, 15, 20, 25, 30)),
                 Axis("nats per token", (LEAST_DRAWN, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3), logarithmic=True), lines)


def main() -> None:
    """Measure what is missing, write after every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path, help="write page and picture in this folder again")
    parser.add_argument("--only", default="", help="names of rows")
    options = parser.parse_args()
    if options.draw:
        return write(options.draw / "long_context_smollm2.json")
    if not (options.checkpoint and options.text and options.out):
        parser.error("--checkpoint, --text and --out, or --draw")
    torch.set_num_threads(1)
    place = options.out / "long_context_smollm2.json"
    results: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    wanted = [row for row in ROWS if row.name not in results and (not options.only
                                                                  or row.name in options.only.split(","))]
    checkpoint = open_checkpoint(options.checkpoint)
    spec = probe(load_config(checkpoint))
    model = load(checkpoint)
    tokens = text_tokens(checkpoint, options.text, max(row.tokens for row in ROWS))
    known: dict[tuple[int, int], Measurement] = {}
    for row in wanted:
        started, key = time.time(), (row.tokens, row.setting.leaf)
        if key not in known:
            known.clear()  # one exact run's hidden states at a time
            sequence = Sequence.of(tokens, row.tokens, row.setting.leaf, str(options.text))
            known[key] = Measurement(model, spec, row.setting, 0, sequence, checkpoint.source)
        known[key].use(row.setting)
        more: dict[str, Any] = {}
        if row.last:
            layers = tuple(range(spec.depth - row.last, spec.depth))
            found = known[key].of(layers)
        else:
            choice = choose(known[key], max_loss=0.05, min_copy=0.95, report=lambda *what: print(*what, flush=True))
            layers, found = choice.layers, choice.quality
            more["alone"] = {str(layer): {"loss": one.loss, "kl": one.kl, "copy_score": one.copy_score}
                             for layer, one in choice.alone.items()}
        if row.fails:
            watch = LayerWatch(row.setting, 0, frozenset(layers))
            known[key].look(watch)
            more["failures"] = reported(row, layers, replace(found, layers=tuple(watch.found.values())))
        facts = {name: value for name, value in asdict(found).items()
                 if name not in ("layers", "seconds", "exact_seconds")}
        results[row.name] = {**facts, "loss": found.loss, "perplexity": found.perplexity, "layers": list(layers),
                             "exact_perplexity": found.exact_perplexity, "copy_score": found.copy_score,
                             "setting": row.setting.attributes(), **more}
        print(row.name, {name: results[row.name][name] for name in ("loss", "kl", "copy", "copy_score")},
              f"{time.time() - started:.0f} s", flush=True)
        place.write_text(json.dumps(results, indent=1) + "\n")
        write(place)
    for line in [line for row in ROWS if row.name in results for line in broken(row, results[row.name])]:
        print("not met:", line)
    return None


if __name__ == "__main__":
    main()
