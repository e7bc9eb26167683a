"""The runs of tests/ptx (the compiled kernels on the PTX interpreter, against fp64) on the Triton that is installed.

    python scripts/ptx_cases.py --out FILE.json

Continuous integration makes these runs on one Triton; `scripts/bare_checkout.py` makes them on another. A run whose
kernels would be compiled from the same source, with the same numbers, is taken from FILE if it is there already.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests")]

from evidence.checkout import alias_packages  # noqa: E402


def sources_of(kernel: Any) -> str:
    """The text of a kernel and of all that it calls: the same under every Triton, other than Triton's own key."""
    found: dict[str, str] = {}

    def add(function: Any) -> None:
        plain = getattr(function, "fn", None)
        if plain is None or not str(getattr(plain, "__module__", "")).startswith(("gqa_plugins", "plugins")):
            return
        if plain.__qualname__ in found:
            return
        found[plain.__qualname__] = inspect.getsource(plain)
        names = [*plain.__code__.co_names]
        for name in names:
            value = plain.__globals__.get(name)
            if isinstance(value, int | float | str | bool) or type(value).__name__ == "constexpr":
                found[name] = str(getattr(value, "value", value))
            add(value)

    add(kernel)
    return "\n".join(f"{name}\n{text}" for name, text in sorted(found.items()))


def code_of(run: Any) -> str:
    """What decides the compiled code of a run's kernels but Triton itself."""
    from gqa_plugins.grouped_attention.recipes import recipe
    from ptx.attention import variants_of

    parts = []
    for name, variant in sorted(variants_of(run).items()):
        one = recipe(variant, run.capability)
        parts.append([name, run.capability, variant.dtype, sources_of(one.kernel), list(one.arguments), one.constants,
                      one.options])
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def run_all(kept: dict[str, Any]) -> dict[str, Any]:
    """Every run by its name; those of `kept` (of the same Triton) whose code is the same are not made again."""
    from ptx.attention import check
    from ptx.cases import RUNS
    from ptx.fault import Fault

    same = kept.get("runs", {}) if kept.get("triton") == version("triton") else {}
    found: dict[str, Any] = {}
    for name, run in RUNS.items():
        code, began = code_of(run), time.process_time()
        if same.get(name, {}).get("code") == code and same[name]["ok"]:
            found[name] = same[name]
            continue
        try:
            result = check(run)
            outcome: dict[str, Any] = {"error": result.error, "allowed": result.allowed, "ok": result.ok}
        except (Fault, AssertionError, NotImplementedError, KeyError) as wrong:
            outcome = {"ok": False, "fault": f"{type(wrong).__name__}: {wrong}"[:500]}
        found[name] = {"capability": run.capability, "kind": run.kind, "dtype": run.case.dtype, "code": code, **outcome,
                       "cpu_seconds": round(time.process_time() - began, 1)}
        print(f"{'right' if outcome['ok'] else 'WRONG'}  {name}", flush=True)
    return {"triton": version("triton"), "torch": version("torch"), "numpy": version("numpy"), "runs": found}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        print("unset TRITON_INTERPRET: kernels are compiled here", file=sys.stderr)
        return 3
    alias_packages()
    kept = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    found = run_all(kept)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(not all(run["ok"] for run in found["runs"].values()))


if __name__ == "__main__":
    sys.exit(main())
