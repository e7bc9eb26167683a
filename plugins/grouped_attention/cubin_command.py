"""The command line of `cubin`: compile a model's attention kernels into a folder."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gqa_plugins.grouped_attention import plan
from gqa_plugins.grouped_attention.cubin import SUFFIX, Cubin, build, model_variants, parse_capability

from gqa_export.errors import GqaExportError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gqa_plugins.grouped_attention.cubin",
        description="Compile a model's attention kernels ahead of time; no GPU is needed.",
        epilog="example: --heads 32 --kv-heads 8 --head-size 128 --dtype bf16 --capability 8.9 --out kernels")
    parser.add_argument("--heads", type=int, required=True, help="query heads of a layer")
    parser.add_argument("--kv-heads", type=int, required=True, help="key/value heads of a layer")
    parser.add_argument("--head-size", type=int, required=True, help="features of a query or key head")
    parser.add_argument("--value-head-size", type=int, help="features of a value head (default: head size)")
    parser.add_argument("--dtype", choices=tuple(plan.DTYPE_BYTES), required=True)
    parser.add_argument("--capability", action="append", metavar="X.Y",
                        help="compute capability, repeatable (default: all of "
                             + ", ".join(f"{c // 10}.{c % 10}" for c in plan.CAPABILITIES) + ")")
    parser.add_argument("--window", choices=("none", "all", "some"), default="none",
                        help="layers with a sliding window")
    parser.add_argument("--softcap", action="store_true", help="scores are soft-capped")
    parser.add_argument("--sinks", action="store_true", help="heads have attention sinks")
    parser.add_argument("--rotary-size", type=int, default=0,
                        help="features that append rotates (default 0: queries and keys come rotated)")
    parser.add_argument("--interleaved", action="store_true", help="rotary pairs are neighbours")
    parser.add_argument("--cache", choices=tuple(plan.CACHE_KINDS), default="",
                        help="codes that the cache holds (default: numbers)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        variants = model_variants(
            heads=options.heads, kv_heads=options.kv_heads, head=options.head_size, value_head=options.value_head_size,
            dtype=options.dtype, windows={"none": (False,), "all": (True,), "some": (False, True)}[options.window],
            softcap=options.softcap, sinks=options.sinks, rotary_size=options.rotary_size,
            interleaved=options.interleaved, cache=options.cache)
        capabilities = [parse_capability(text) for text in options.capability or map(str, plan.CAPABILITIES)]
        files = build(variants, capabilities, options.jobs)
    except GqaExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    options.out.mkdir(parents=True, exist_ok=True)
    for (variant, capability), data in files.items():
        path = options.out / f"{variant.name}.sm_{capability}{SUFFIX}"
        path.write_bytes(data)
        facts = Cubin.from_bytes(data, str(path))
        print(f"{path.name}  {len(data)} bytes, {facts.shared_bytes} shared, {facts.threads} threads")
    return 0
