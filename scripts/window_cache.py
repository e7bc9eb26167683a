"""Bytes of the KV cache of models with windows at 32k tokens, with whole caches and with `--window-cache small`.

    python scripts/window_cache.py      -> docs/benchmarks/window_cache.json, .md

Arithmetic, no measurement: what `gqa-export inspect` says of a bundle of that shape. Shapes are those of the published
configurations; a window counts the current token, as in `gqa_export.attention_op`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
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
    """layers, heads, kv_heads, head size, window; every `full`-th layer sees all, 0: none does; the last `shared` of
    them read the cache of the last of their kind before them; `full_head`: the head size of layers that see all, 0:
    `head`."""

    layers: int
    heads: int
    kv_heads: int
    head: int
    window: int
    full: int
    shared: int = 0
    full_head: int = 0

    @property
    def spec(self) -> ModelSpec:
        """Its layers, as an export has them."""
        found: list[AttentionSpec] = []
        for number in range(self.layers):
            window = 0 if self.full and (number + 1) % self.full == 0 else self.window
            head = self.full_head if self.full_head and not window else self.head
            owner = None
            if number >= self.layers - self.shared:
                owner = max(each.layer for each in found if each.owner is None and each.window == window)
            found.append(AttentionSpec(number, self.heads, self.kv_heads, head, head, head**-0.5, window=window,
                                       owner=owner))
        return ModelSpec("", "", 1, 0, TOKENS, "", tuple(found))


SHAPES = {
    "Gemma 3 1B": Shape(26, 4, 1, 256, 512, 6),
    "Gemma 3 4B": Shape(34, 8, 4, 256, 1024, 6),
    "Gemma 3 27B": Shape(62, 32, 16, 128, 1024, 6),
    "GPT-OSS 20B": Shape(24, 64, 8, 64, 128, 2),
    "GPT-OSS 120B": Shape(36, 64, 8, 64, 128, 2),
    "Mistral 7B v0.1": Shape(32, 32, 8, 128, 4096, 0),
}

SHARING = {
    "Gemma 3n E2B": Shape(30, 8, 2, 256, 512, 5, 10),
    "Gemma 3n E4B": Shape(35, 8, 2, 256, 512, 5, 15),
    "Gemma 4 E2B": Shape(35, 8, 1, 256, 512, 5, 20, 512),
    "Gemma 4 E4B": Shape(42, 8, 2, 256, 512, 6, 18, 512),
}
"""models whose last layers read the keys and values of others"""


def sharing() -> dict[str, Any]:
    """Of each model of `SHARING`: a copy in every layer, as it was before, and the caches of the owners alone."""
    rows = {}
    for name, shape in SHARING.items():
        spec = shape.spec
        copies = replace(spec, layers=tuple(replace(layer, owner=None) for layer in spec.layers))
        windows = WindowCache.of(spec.layers, TOKENS, PROMPT_CHUNK)
        rows[name] = {"layers": shape.layers, "owners": len(spec.owners), "copies": cache_bytes(copies, BITS, TOKENS),
                      "whole": cache_bytes(spec, BITS, TOKENS), "small": cache_bytes(spec, BITS, TOKENS, windows)}
    return rows


def figures() -> dict[str, Any]:
    """Everything that the page shows, in bytes."""
    rows = {}
    for name, shape in SHAPES.items():
        spec = shape.spec
        small = {str(chunk): cache_bytes(spec, BITS, TOKENS, WindowCache.of(spec.layers, TOKENS, chunk))
                 for chunk in CHUNKS}
        rows[name] = {"windowed": sum(layer.window > 0 for layer in spec.layers), "layers": shape.layers,
                      "window": shape.window, "whole": cache_bytes(spec, BITS, TOKENS), "small": small}
    return {"tokens": TOKENS, "bits": BITS, "models": rows, "sharing": sharing()}


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
    lines += ["", "## Layers that share caches", "",
              "The last layers of these models read the keys and values of a layer before them. A bundle keeps one",
              "cache for each layer that has keys and values of its own; it used to keep a copy in every layer. The",
              f"last column is with `--window-cache small` and a prompt chunk of {PROMPT_CHUNK}.", "",
              "| model | caches of layers | a copy in every layer | one cache an owner | rings of owners |",
              "|---|---|---|---|---|"]
    for name, row in report["sharing"].items():
        shown = [f"{readable_bytes(row[kind])} ({row['copies'] / row[kind]:.1f}x less)" for kind in ("whole", "small")]
        lines.append(f"| {name} | {row['owners']} of {row['layers']} | {readable_bytes(row['copies'])} | "
                     f"{' | '.join(shown)} |")
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
