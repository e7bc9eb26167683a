"""The table of architectures: which of transformers' causal language models were checked, and what came of it.

Data: `models/matrix.json`, written by `scripts/matrix.py`; a row per name of `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..environment.versions import versions as installed_versions
from ..errors import GqaExportError

AGAIN = "run `python scripts/matrix.py --resume` and commit what it writes"
ENDS = ("supported", "refused", "wrong", "failed", "unchecked")
"""how a row can end; only the first is supported: `wrong` and `failed` are bugs of ours, `unchecked` was not run"""


def table() -> dict[str, Any]:
    """The whole table: `rows` by name, `versions` it was made with, `date`; `tensor_parallel`: the rows of
    `scripts/tensor_parallel.py`.

    Raises:
        GqaExportError: the file is missing from this installation.
    """
    import gqa_models

    path = Path(gqa_models.__file__).parent / "matrix.json"
    if not path.is_file():
        raise GqaExportError("the table of architectures is missing from this installation", str(path), AGAIN,
                             code="E-ENV-TABLE-MISSING")
    cut = path.with_name("tensor_parallel.json")
    rows = json.loads(cut.read_text(encoding="utf-8")) if cut.is_file() else {}
    return {**json.loads(path.read_text(encoding="utf-8")), "tensor_parallel": rows}


def known_names() -> dict[str, str]:
    """Causal-LM names that the installed transformers knows, each with its class (the first if it has several)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return {name: value if isinstance(value, str) else value[0] for name, value in NAMES.items()}


def versions() -> dict[str, str]:
    """Versions of the installed packages that a row depends on."""
    return installed_versions(("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "onnx-ir"))


def missing(rows: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Names without a row."""
    return sorted(set(names) - set(rows))


def counts(data: dict[str, Any]) -> dict[str, int]:
    """How many rows ended in each way; all of `ENDS`, zero or not."""
    found = Counter(row["verdict"] for row in data["rows"].values())
    return {end: found[end] for end in ENDS}


def document(data: dict[str, Any]) -> str:
    """The text of docs/models.md for a table."""
    how = counts(data)
    made_with = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    lines = [
        "# Architectures", "",
        "Written by `scripts/matrix.py`; do not edit. The same table: `gqa-export models`, with `--json` as data.", "",
        f"transformers has {len(data['rows'])} causal language models by name. A small random model of each was made "
        "(only sizes shrink: epsilons, scales, rotary bases and softcaps are those of its configuration class), "
        "exported (fp32) and compared with PyTorch in fp64 on a CPU: prompts longer than the attention window, decode "
        "steps, ragged batches, garbage in the unused cache. *Supported* means that every target and cache in the row "
        "passed. A model that is not supported is refused by name at export, or fails the comparison that "
        "`gqa-export onnx` makes afterwards.", "",
        f"**{how['supported']} supported**, {how['refused']} refused, {how['wrong']} differ from PyTorch, "
        f"{how['failed']} fail in another way, {how['unchecked']} not checked. {data['date']}, {made_with}.",
        *later_rows(data), "", "## Supported", "",
        "| name | attention | states | checked | largest difference (allowed) | depth | over 2 devices | drawn at |",
        "|---|---|---|---|---|---|---|---|"]
    cut = data.get("tensor_parallel", {})
    for name, row in sorted(data["rows"].items()):
        if row["verdict"] == "supported":
            worst = max(row["worst"].values(), key=lambda pair: pair[0])
            kinds = (", ".join(row.get(kind, [])) or "none" for kind in ("features", "states"))
            lines.append(f"| {name} | {' | '.join(kinds)} | {checked(row)} | {worst[0]:.1e} "
                         f"({worst[1]:.1e}) | {row.get('depth') or 'not compared'} | {cut_over(cut.get(name))} | "
                         f"{drawn_at(row)} |")
    older = sum(row["verdict"] == "supported" and "drawn" not in row for row in data["rows"].values())
    if older:
        lines += ["", f"{older} rows do not show what they were drawn at: they are older, and their query scales "
                      "shrank with the sizes. `scripts/matrix.py --stale` makes them again."]
    lines += not_cut(cut)
    for title, end in (("Refused", "refused"), ("Differ from PyTorch: not supported", "wrong"),
                       ("Fail in another way: not supported", "failed"), ("Not checked: not supported", "unchecked")):
        rows = {name: row for name, row in sorted(data["rows"].items()) if row["verdict"] == end}
        if rows:
            lines += ["", f"## {title}", "", "| name | reason |", "|---|---|"]
            lines += [f"| {name} | {escaped(row.get('reason', ''))} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def cut_over(row: dict[str, Any] | None) -> str:
    """Whether an architecture can be cut over two devices: "yes", the code of the refusal, or "-" where TensorRT does
    not hold it."""
    if row is None:
        return "-"
    return "yes" if row["verdict"] == "sharded" else row.get("code", row["verdict"])


def not_cut(rows: dict[str, Any]) -> list[str]:
    """The section on architectures that cannot be cut over two devices, each with its reason."""
    refused = {name: row for name, row in sorted(rows.items()) if row["verdict"] != "sharded"}
    if not rows:
        return []
    lines = ["", "## Over two devices", "",
             f"{len(rows) - len(refused)} of {len(rows)} architectures that keep keys and values only were cut over "
             "two ranks (`--target trt-plugin --tensor-parallel 2`; trt-native where the plugin cannot hold a layer), "
             "opened as one merged graph and compared with PyTorch, by `scripts/tensor_parallel.py`: "
             "[how](tensor-parallel.md). The others:", "",
             "| name | code | reason |", "|---|---|---|"]
    return lines + [f"| {name} | `{row.get('code', row['verdict'])}` | {escaped(row.get('reason', ''))} |"
                    for name, row in refused.items()]


def later_rows(data: dict[str, Any]) -> list[str]:
    """Which rows were made by other versions than the table, as lines of docs/models.md."""
    made: dict[str, list[str]] = {}
    for name, row in sorted(data["rows"].items()):
        others = [f"{package} {number}" for package, number in row.get("made_with", {}).items()
                  if data["versions"].get(package) != number]
        if others:
            made.setdefault(", ".join(others), []).append(name)
    return [f"Made with {others}: {', '.join(names)}." for others, names in made.items()]


def checked(row: dict[str, Any]) -> str:
    """Targets and caches that a row was validated on: "ort and portable, growing and static"."""
    parts = [key.split("/") for key in row.get("worst", {})]
    targets, caches = dict.fromkeys(part[0] for part in parts), dict.fromkeys(part[1] for part in parts)
    return f"{' and '.join(targets)}, {' and '.join(caches)}"


def drawn_at(row: dict[str, Any]) -> str:
    """The numbers of a row's small configuration that go into arithmetic: "rms_norm_eps 1e-08, rope_theta 100000"."""
    return ", ".join(f"{name} {value:g}" for name, value in row.get("scalars", {}).items())


def escaped(text: str) -> str:
    """Text that fits into one cell of a Markdown table."""
    return " ".join(text.replace("|", "/").split())[:400]
