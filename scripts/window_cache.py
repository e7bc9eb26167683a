"""Bytes of the KV cache of models with windows at 32k tokens, with whole caches and with `--window-cache small`.

    python scripts/window_cache.py      -> docs/benchmarks/window_cache.json, .md

Arithmetic, no measurement: what `gqa-export inspect` says of a bundle of that shape. Shapes are those of the published
configurations; a window counts the current token, as in `gqa_export.attention_op`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gqa_export.cli.tables import readable_bytes
from gqa_export.describe.inspection import cache_bytes
from gqa_export.exporting.window_plan import PROMPT_CHUNK
from gqa_export.spec import AttentionSpec, ModelSpec, WindowCache

OUT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
NAME = "window_cache"
TOKENS, BITS = 32768, 16
CHUNKS = (128, PROMPT_CHUNK, 2048)


@dataclass(frozen=True)
class Shape:
    """layers, heads, kv_heads, head size, window; every `full`-th layer sees all, 0: none does."""

    layers: int
    heads: int
    kv_heads: int
    head: int
    window: int
    full: int

    @property
    def spec(self) -> ModelSpec:
        """Its layers, as an export has them."""
        found = tuple(AttentionSpec(
            number, self.heads, self.kv_heads, self.head, self.head, self.head**-0.5,
            window=0 if self.full and (number + 1) % self.full == 0 else self.window) for number in range(self.layers))
        return ModelSpec("", "", 1, 0, TOKENS, "", found)


SHAPES = {
    "Gemma 3 1B": Shape(26, 4, 1, 256, 512, 6),
    "Gemma 3 4B": Shape(34, 8, 4, 256, 1024, 6),
    "Gemma 3 27B": Shape(62, 32, 16, 128, 1024, 6),
    "GPT-OSS 20B": Shape(24, 64, 8, 64, 128, 2),
    "GPT-OSS 120B": Shape(36, 64, 8, 64, 128, 2),
    "Mistral 7B v0.1": Shape(32, 32, 8, 128, 4096, 0),
}


def figures() -> dict[str, Any]:
    """Everything that the page shows, in bytes."""
    rows = {}
    for name, shape in SHAPES.items():
        spec = shape.spec
        small = {str(chunk): cache_bytes(spec, BITS, TOKENS, WindowCache.of(spec.layers, TOKENS, chunk))
                 for chunk in CHUNKS}
        rows[name] = {"windowed": sum(layer.window > 0 for layer in spec.layers), "layers": shape.layers,
                      "window": shape.window, "whole": cache_bytes(spec, BITS, TOKENS), "small": small}
    return {"tokens": TOKENS, "bits": BITS, "models": rows}


def page(report: dict[str, Any]) -> str:
    """The page in markdown."""
    head = [f"prompt chunk {chunk}" for chunk in CHUNKS]
    lines = [
        "# Caches of models with windows", "",
        f"Bytes of the KV cache of one sequence of {report['tokens']:,} tokens, {report['bits']} bits an element. "
        "Computed from the published shapes by",
        "`scripts/window_cache.py`, as `gqa-export inspect` does for a bundle; not measured. A layer with a window",
        "keeps the whole sequence, or, with `--window-cache small`, its window and one prompt chunk.", "",
        f"| model | windowed layers | window | whole | {' | '.join(head)} |", "|---" * (4 + len(head)) + "|"]
    for name, row in report["models"].items():
        small = [f"{readable_bytes(size)} ({row['whole'] / size:.1f}x less)" for size in row["small"].values()]
        lines.append(f"| {name} | {row['windowed']} of {row['layers']} | {row['window']} | "
                     f"{readable_bytes(row['whole'])} | {' | '.join(small)} |")
    return "\n".join(lines) + "\n"


@click.command()
def main() -> None:
    """Write both files."""
    report = figures()
    (OUT / f"{NAME}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (OUT / f"{NAME}.md").write_text(page(report), encoding="utf-8")
    click.echo(page(report))


if __name__ == "__main__":
    main()
