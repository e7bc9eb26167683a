"""Compile the kernels of four models for every GPU that they are meant for, and write down what came out.

    python scripts/compile_kernels.py [--jobs N]      -> docs/benchmarks/kernels_compiled.json, .md
    python scripts/compile_kernels.py --long          -> docs/benchmarks/long_kernels_compiled.json, .md

    python scripts/compile_kernels.py --only TEXT -> rows whose model has this text; the others stay as they are

The second is of the kernels for long prompts, with the defaults of `--long-attention`. No GPU is needed. A result names
the sha256 of the kernels' sources, so that a test can tell when it is stale.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "benchmarks"
NAME, LONG_NAME = "kernels_compiled", "long_kernels_compiled"
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {"heads": 32, "kv_heads": 8, "head": 128},
    "Qwen2.5-0.5B": {"heads": 14, "kv_heads": 2, "head": 64},
    "Gemma-3-270M": {"heads": 4, "kv_heads": 1, "head": 256, "windows": (False, True)},
    "SmolLM2-135M": {"heads": 9, "kv_heads": 3, "head": 64},
}
DTYPES = ("bf16", "fp16", "fp32")
CODED_MODEL, CODED_DTYPE = "Llama-3-8B", "bf16"
"""what is compiled with a cache of codes too"""
SOURCES = ("append", "decode", "prefill", "primitives", "plan", "cubin", "recipes")
"""modules of gqa_plugins.grouped_attention that decide what is compiled"""
LONG_MODELS = (("Llama-3-8B", "bf16"), ("SmolLM2-135M", "fp16"))
LONG_SOURCES = ("long_attend", "long_launch", "long_prefill", "long_rows", "long_select", "primitives", "plan")


def sources_sha256(long: bool = False) -> str:
    """Of the modules in SOURCES, or in LONG_SOURCES, in that order."""
    folder = ROOT / "plugins" / "grouped_attention"
    names = LONG_SOURCES if long else SOURCES
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in names)).hexdigest()


def wanted(long: bool) -> list[tuple[str, str, list[Any]]]:
    """(model, dtype, variants) of every row of the page."""
    from gqa_plugins.grouped_attention import cubin, long_launch, plan

    from gqa_export.long_attention_op import DEFAULTS, PROJECTIONS

    if not long:
        plain = [(model, dtype, cubin.model_variants(dtype=dtype, **sizes)) for model, sizes in MODELS.items()
                 for dtype in DTYPES]
        return plain + [(f"{CODED_MODEL}, {cache} cache", CODED_DTYPE, cubin.model_variants(
            dtype=CODED_DTYPE, cache=cache, **MODELS[CODED_MODEL])) for cache in plan.CACHE_KINDS]
    found = []
    for (model, dtype), (method, setting) in itertools.product(LONG_MODELS, DEFAULTS.items()):
        group, head = MODELS[model]["heads"] // MODELS[model]["kv_heads"], MODELS[model]["head"]
        found.append((f"{model}, {method}", dtype, [
            cubin.Variant(kernel, dtype, group, head, head, long_launch.rows_of(kernel, setting, group), long=setting,
                          projections=PROJECTIONS) for kernel in long_launch.KERNELS]))
    return found


def compile_all(jobs: int, long: bool, only: str = "") -> dict[str, Any]:
    """One row per model, dtype and capability. only: of models whose name has this text."""
    from gqa_plugins.grouped_attention import cubin, plan

    rows = []
    for model, dtype, variants in (row for row in wanted(long) if only in row[0]):
        for capability in plan.CAPABILITIES:
            if variants[0].cache == "fp8" and capability < plan.FP8_CAPABILITY:
                continue
            built = cubin.build(variants, [capability], jobs)
            made = [cubin.Cubin.from_bytes(data, model) for data in built.values()]
            rows.append({"model": model, "dtype": dtype, "capability": capability, "kernels": len(made),
                         "code_bytes": sum(len(one.code) for one in made),
                         "most_shared_bytes": max(one.shared_bytes for one in made),
                         "shared_limit_bytes": plan.SHARED_KIB[capability] * 1024})
            click.echo(f"{model} {dtype} {capability}: {rows[-1]}")
    return {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {platform.system()}, no GPU",
            "versions": {"triton": version("triton"), "torch": version("torch")},
            "sources_sha256": sources_sha256(long), "rows": rows}


def page(report: dict[str, Any]) -> str:
    """The report as Markdown: a line per model and dtype, a column per capability."""
    capabilities = sorted({row["capability"] for row in report["rows"]})
    found = {(row["model"], row["dtype"], row["capability"]): row for row in report["rows"]}
    spoken = [f"{number // 10}.{number % 10}" for number in capabilities]
    lines = ["# Kernels compiled ahead of time", "",
             f"{report['date']}, {report['machine']}; " + ", ".join(f"{n} {v}" for n, v in report["versions"].items())
             + ". Made by `scripts/compile_kernels.py`.", "",
             "Every kernel of a model, compiled for every compute capability: KiB of machine code of all its kernels, "
             "and in brackets the most shared memory that one asks for, in KiB. That a kernel compiles says nothing "
             "about its results: those are shown by the interpreter (tests/plugins) and on a GPU "
             "(scripts/gpu_check.py).", "",
             f"| model | type | kernels | {' | '.join(spoken)} |", "|---" * (3 + len(capabilities)) + "|"]
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in report["rows"]):
        some = [found.get((model, dtype, capability)) for capability in capabilities]
        cells = [f"{row['code_bytes'] / 1024:.0f} ({row['most_shared_bytes'] / 1024:.0f})" if row else "refused"
                 for row in some]
        kernels = next(row["kernels"] for row in some if row)
        lines.append(f"| {model} | {dtype} | {kernels} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--jobs", default=1, show_default=True, help="Compilations at a time.")
@click.option("--long", is_flag=True, help="The kernels for long prompts, and no others.")
@click.option("--only", default="", metavar="TEXT",
              help="Compile models whose name has this text; keep the other rows of a report of the same sources.")
def main(jobs: int, long: bool, only: str) -> None:
    """Compile everything; write the result."""
    report, name = compile_all(jobs, long, only), LONG_NAME if long else NAME
    if only:
        known = json.loads((OUT / f"{name}.json").read_text(encoding="utf-8"))
        if known["sources_sha256"] != report["sources_sha256"]:
            raise click.ClickException("the report is of other sources: compile everything, without --only")
        made = {(row["model"], row["dtype"]) for row in report["rows"]}
        report["rows"] = [row for row in known["rows"] if (row["model"], row["dtype"]) not in made] + report["rows"]
    (OUT / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (OUT / f"{name}.md").write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
