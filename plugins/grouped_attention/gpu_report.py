"""Results of `scripts/gpu_check.py` as JSON, Markdown and a short table. Standard library only, no GPU.

A result is a plain dictionary: when, command, card, versions, stages (what became of each part) and what `nothing`
lists. A peer that could not run has its reason in place of a time; nothing is left out in silence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COPY_TARGET = 0.90  # of the measured copy bandwidth, decode at batch 16, 32 k tokens, H/K 32/8, D 128, bf16
RAGGED_TARGET = 0.85  # the same, of a sequence of 128 k tokens among 15 of 1 k, counting the tokens that are there
PREFILL_TARGET = 0.90  # of the fastest SDPA backend's speed, prefill at 8 k, causal, D 128, bf16
SDPA = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math")


def nothing() -> dict[str, Any]:
    """The parts of a result, before anything is measured."""
    return {"ceilings": {}, "smoke": [], "graph": {}, "shipping": [], "shipping_note": "", "correctness": [],
            "decode": [], "ragged": [], "prefill": [], "model": [], "model_speed": {}, "counters": {}, "sanitizer": {},
            "engines": [], "stages": {}}


def judged(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every row that can be right or wrong."""
    lists = (row for name in ("smoke", "shipping", "correctness", "model", "engines") for row in results[name])
    return [*lists, *(results[name] for name in ("graph", "model_speed", "sanitizer") if results[name])]


def fastest(peers: dict[str, Any], names: Iterable[str] | None = None) -> tuple[str, float] | None:
    """(name, ms) of the fastest peer that ran, among `names`; None if none did."""
    wanted = peers if names is None else names
    ran = [(peers[name], name) for name in wanted if isinstance(peers.get(name), int | float)]
    return (min(ran)[1], min(ran)[0]) if ran else None


def verdicts(results: dict[str, Any]) -> list[tuple[str, bool | None, str]]:
    """(what was to be shown, shown or not or None for not measured, the figures)."""
    cases = [row for name in ("smoke", "correctness") for row in results[name] if row["passed"] is not None]
    failed = [row for row in cases if not row["passed"]]
    carried = results["shipping"]
    lines: list[tuple[str, bool | None, str]] = [
        ("every kernel within 2 x eager's error of fp64", not failed if cases else None,
         f"{len(cases) - len(failed)} of {len(cases)} cases"),
        ("a captured graph serves other lengths", results["graph"].get("passed"), results["graph"].get("note", "")),
        ("compiled files, launched from Python and C++, right and the same bits",
         all(row["passed"] for row in carried) if carried else None,
         f"{sum(row['passed'] for row in carried)} of {len(carried)}; {results['shipping_note']}" if carried else ""),
    ]
    reading = [row for row in results["decode"] if (row["batch"], row["length"]) == (16, 32768)]
    lines.append((f"decode at batch 16, 32 k reads at >= {COPY_TARGET:.0%} of copy bandwidth",
                  all(row["of_copy"] >= COPY_TARGET for row in reading) if reading else None,
                  ", ".join(f"{row['of_copy']:.0%}" for row in reading)))
    lines.append((f"decode of 128 k among 15 x 1 k reads at >= {RAGGED_TARGET:.0%} of copy bandwidth",
                  all(row["of_copy"] >= RAGGED_TARGET for row in results["ragged"]) if results["ragged"] else None,
                  ", ".join(f"{row['of_copy']:.0%}" for row in results["ragged"])))
    slower = [row for row in results["decode"]
              if (best := fastest(row["peers"], SDPA)) is not None and row["ours_ms"] > best[1]]
    compared = [row for row in results["decode"] if fastest(row["peers"], SDPA) is not None]
    lines.append(("decode never slower than the fastest SDPA backend", not slower if compared else None,
                  f"faster in {len(compared) - len(slower)} of {len(compared)}"))
    long = [(row, best) for row in results["prefill"]
            if row["length"] == 8192 and (best := fastest(row["peers"], SDPA)) is not None]
    lines.append((f"prefill at 8 k >= {PREFILL_TARGET} of the fastest SDPA backend",
                  all(best[1] / row["ours_ms"] >= PREFILL_TARGET for row, best in long) if long else None,
                  ", ".join(f"{best[1] / row['ours_ms']:.2f}" for row, best in long)))
    rows, speed = results["model"], results["model_speed"]
    told = f", {speed['tokens_s']:.0f} tokens/s, {speed['of_copy']:.0%} of copy" if speed else ""
    lines.append(("a transformers model decodes through the kernels, captured too",
                  all(row["passed"] for row in (*rows, *([speed] if speed else []))) if rows else None,
                  f"{sum(row['passed'] for row in rows)} of {len(rows)}{told}" if rows else ""))
    lines.append(("compute-sanitizer finds nothing", results["sanitizer"].get("passed"),
                  results["sanitizer"].get("note", "")))
    for row in results["engines"]:
        speed = "" if row["tokens_s"] is None else f"{row['tokens_s']:.0f} tokens/s, {row['of_copy']:.0%} of copy; "
        lines.append((f"engine of {row['flavor']} {row['version']}, {row['attention']} attention, equals PyTorch",
                      row["passed"], speed + row["note"][:60]))
    return lines


def _word(passed: bool | None) -> str:
    return {True: "yes", False: "NO", None: "not measured"}[passed]


def _grid(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def table(results: dict[str, Any]) -> str:
    """The short table for the end of the terminal."""
    rows = [["shown", "what", "figures"], *([_word(passed), what, note] for what, passed, note in verdicts(results))]
    missing = [f"{name} {fact['status']}: {fact['note']}" for name, fact in results.get("stages", {}).items()
               if fact["status"] != "done"]
    return "\n".join([f"{results['card']}: {_ceilings(results)}", _grid(rows), *missing])


def _ceilings(results: dict[str, Any]) -> str:
    found = results["ceilings"]
    if not found:
        return "ceilings not measured"
    return f"copy {found['copy_gb_s']:.0f} GB/s, bf16 product {found['matmul_tflop_s']:.0f} TFLOP/s"


def _milliseconds(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else str(value)


def _lines(rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0]),
            *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows[1:])]


def _speeds(rows: list[dict[str, Any]], measure: str, unit: str) -> list[str]:
    names = sorted({name for row in rows for name in row["peers"]})
    in_turn, reading = any("in_turn_ms" in row for row in rows), measure == "gb_s"
    header = ["shape", "batch", "length", "ours ms", *(["in turn ms"] if in_turn else []), "with append ms", unit,
              *(["of copy"] if reading else []), *(f"{name} ms" for name in names)]
    return _lines([header, *([row["shape"], str(row["batch"]), str(row["length"]), _milliseconds(row["ours_ms"]),
                              *([_milliseconds(row.get("in_turn_ms") or "-")] if in_turn else []),
                              _milliseconds(row["step_ms"]), f"{row[measure]:.0f}",
                              *([f"{row['of_copy']:.0%}"] if reading else []),
                              *(_milliseconds(row["peers"].get(name, "-")) for name in names)] for row in rows)])


def markdown(results: dict[str, Any]) -> str:
    """The full report."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    text = ["# Grouped-attention kernels on a GPU", "", f"- date: {results['when']}", f"- card: {results['card']}",
            f"- versions: {versions}", f"- command: `{results['command']}`",
            f"- ceilings measured in this run (a copy: bytes read plus bytes written): {_ceilings(results)}", "",
            "## What was to be shown", "",
            *_lines([["shown", "what", "figures"], *([_word(ok), what, note] for what, ok, note in verdicts(results))])]
    if results.get("stages"):
        text += ["", "## Stages", "", *_lines([["stage", "status", "seconds", "note"], *(
            [name, fact["status"], f"{fact['seconds']:.1f}", fact["note"]]
            for name, fact in results["stages"].items())])]
    if results["decode"]:
        text += ["", "## Decode: one new token, median of graph replays (GB/s: bytes of keys and values over time)", "",
                 *_speeds(results["decode"], "gb_s", "GB/s")]
    if results["prefill"]:
        text += ["", "## Prefill: causal (in turn: the earlier loop, whose products wait for the softmax)", "",
                 *_speeds(results["prefill"], "tflop_s", "TFLOP/s")]
    if results["ragged"]:
        text += ["", "## Decode of a ragged batch: GB/s of the tokens that are there", "",
                 *_speeds(results["ragged"], "gb_s", "GB/s")]
    if results["model_speed"]:
        row = results["model_speed"]
        text += ["", "## A transformers model, decode step in a captured graph, batch 1", "",
                 *_lines([["model", "length", "step ms", "tokens/s", "of copy", "from the call outside the graph"],
                          [row["model"], str(row["length"]), _milliseconds(row["step_ms"]), f"{row['tokens_s']:.0f}",
                           f"{row['of_copy']:.0%}", f"{row['difference']:.3g}"]])]
    if results["counters"]:
        text += ["", "## Hardware counters, one launch each", "", *_counters(results["counters"])]
    if results["engines"]:
        text += ["", "## Engines: batch 1, tokens on the device (of copy: weights and cache that a step reads, over "
                 "its time, as a share of copy bandwidth)", "",
                 *_lines([["library", "attention", "type", "passed", "built in s", "length", "step ms", "tokens/s",
                           "of copy", "note"], *(_engine(row) for row in results["engines"])])]
    rows = [row for name in ("smoke", "shipping", "model", "correctness") for row in results[name]]
    if rows:
        text += ["", "## Correctness: largest error against fp64", "",
                 *([f"Compiled files: {results['shipping_note']}.", ""] if results["shipping_note"] else []),
                 *_lines([["case", "kernel", "error", "allowed", "passed"],
                          *([row["case"], row["kernel"], f"{row['error']:.3g}", f"{row['allowed']:.3g}",
                             _word(row["passed"])] for row in rows)])]
    return "\n".join(text) + "\n"


def _counters(found: dict[str, Any]) -> list[str]:
    kernels = [name for name in found if name != "notes"]
    names = list(dict.fromkeys(name for kernel in kernels for name in found[kernel]))
    table = _lines([["kernel", *names], *([kernel, *(found[kernel].get(name, "-") for name in names)]
                                          for kernel in kernels)]) if kernels else []
    return [*table, *([""] if table and found["notes"] else []), *(f"- {note}" for note in found["notes"])]


def _engine(row: dict[str, Any]) -> list[str]:
    measured = row["step_ms"] is not None
    return [f"{row['flavor']} {row['version']}", row["attention"], row["dtype"], _word(row["passed"]),
            "-" if row["build_s"] is None else f"{row['build_s']:.1f}", str(row["length"]),
            _milliseconds(row["step_ms"]) if measured else "-", f"{row['tokens_s']:.0f}" if measured else "-",
            f"{row['of_copy']:.0%}" if measured else "-", row["note"]]


def write(results: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write gpu_check.json and gpu_check.md into the folder (made if needed); return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_markdown = folder / "gpu_check.json", folder / "gpu_check.md"
    _replace(as_json, json.dumps(results, indent=2, allow_nan=True) + "\n")
    _replace(as_markdown, markdown(results))
    return as_json, as_markdown


def _replace(path: Path, text: str) -> None:
    """A reader sees the old text or the new one, also if this process is killed meanwhile."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
