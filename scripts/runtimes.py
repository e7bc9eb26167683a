"""Which releases of ONNX Runtime load the bundles, and do they compute the same? Each in an environment of its own.

    python scripts/runtimes.py        # some minutes; writes docs/benchmarks/runtimes.json and runtimes.md

Tiny models, one for each mechanism that decides which ops a graph has, are exported to the three targets that ONNX
Runtime runs. Every release gets the same prompt (two rows, one padded) and the same two decode steps; its logits are
compared with those of the release in constraints.txt. The environments hold onnxruntime and numpy and nothing else;
they are made in build/runtimes and may be deleted afterwards. Where a release refuses a bundle, its reason must be the
expected one (`expected`).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "benchmarks"
NAME = "runtimes"
OLD = ("1.20.1", "1.22.1")
OPSETS = {"1.20.1": 21, "1.22.1": 22}
"""the highest opset that a release knows, as its refusal of a higher one tells"""
CAPACITY = 64
HEAD_12 = {"head_dim": 12}
SAMPLES: tuple[tuple[str, dict[str, Any], str, str, str], ...] = (
    ("llama", {}, "ort", "growing", "rotary inside attention"),
    ("llama", {}, "ort", "static", "the cache in place"),
    ("mistral", {}, "ort", "growing", "a window"),
    ("gemma2", {}, "ort", "growing", "softcaps, rotary outside"),
    ("gpt_oss", {}, "ort", "growing", "sinks, experts"),
    ("gpt2", {}, "ort", "growing", "positions looked up"),
    ("llama", HEAD_12, "ort", "growing", "layers that fell back to the function"),
    ("llama", {}, "portable", "growing", "the function"),
    ("llama", {}, "portable", "static", "the function, a static cache"),
    ("gemma2", {}, "portable", "growing", "the function with softcaps and windows"),
    ("gpt_oss", {}, "portable", "growing", "the function with sinks, experts"),
    ("llama", {}, "onnx", "growing", "Attention of opset 23"),
    ("llama", {}, "onnx", "static", "TensorScatter of opset 24"),
)
"""model, changes of its configuration, target, cache, what it is for"""
KNOWN = {("gpt_oss", "ort"): "input size 12"}
"""(model, target): words of the refusal by an old release that knows the opset but lacks something else"""
TOLERANCE = 1e-4
"""on logits of magnitude 1 to 20: releases round differently by 1e-6 to 1e-5, a wrong position or mask gives 0.1"""

RUNNER = r'''
import json, sys
import numpy as np, onnxruntime
model, feeds, out = sys.argv[1:]
onnxruntime.set_default_logger_severity(4)
data = np.load(feeds)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
try:
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    past = {name.removeprefix("past/"): data[name] for name in data.files if name.startswith("past/")}
    found = []
    for step in range(int(data["steps"])):
        feed = {"input_ids": data[f"ids/{step}"], "attention_mask": data[f"mask/{step}"], **past}
        outputs = dict(zip(names, session.run(None, feed)))
        found.append(outputs["logits"])
        past = {name: outputs["present." + name.split(".", 1)[1]] for name in past}
    np.savez(out, *found)
    print(json.dumps({"version": onnxruntime.__version__, "refusal": ""}))
except Exception as error:
    print(json.dumps({"version": onnxruntime.__version__, "refusal": " ".join(str(error).split())[-300:]}))
'''


def newest() -> str:
    """The release in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("onnxruntime=="))


def label(sample: tuple[str, dict[str, Any], str, str, str]) -> str:
    """What a sample is called in the result."""
    name, overrides, target, cache, _ = sample
    return " ".join([name, *(f"{key}={value}" for key, value in overrides.items()), target, cache])


def structure(graph: Any) -> str:
    """A hash of a lowered graph: its ops, constants and declared versions, without names of values."""
    from evidence.output_hashes import output_hashes

    imports = sorted((entry.domain, entry.version) for entry in graph.opset_import)
    bodies = [function.SerializeToString(deterministic=True).hex() for function in graph.functions]
    text = json.dumps([output_hashes(graph), imports, graph.ir_version, bodies], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def structures() -> dict[str, dict[str, Any]]:
    """Opset, IR version and structural hash of every sample's graph, as this code makes it; no weights are needed."""
    import gqa_models

    from gqa_export.checkpoint.open import open_checkpoint
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.prepare import traced_model
    from gqa_export.lowering.attention_function import opset_of
    from gqa_export.lowering.context import LowerOptions
    from gqa_export.lowering.lower import lower
    from gqa_export.progress import silent
    from gqa_export.targets import get_target

    found = {}
    with tempfile.TemporaryDirectory(prefix="gqa-runtimes-") as place:
        for name, overrides, target, cache, purpose in SAMPLES:
            folder = Path(place) / "-".join([name, *map(str, overrides.values())])
            if not folder.exists():
                gqa_models.write_tiny(name, folder, **overrides)
            options = ExportOptions("ort", cache=cache, capacity=CAPACITY, logits="all")
            traced = traced_model(open_checkpoint(folder), options, "float32", get_target("ort"), silent)[0]
            graph = lower(traced.model, traced.spec, LowerOptions(target, cache, CAPACITY)).model
            found[label((name, overrides, target, cache, purpose))] = {
                "opset": opset_of(graph), "ir_version": graph.ir_version, "structure": structure(graph)}
    return found


def feeds(folder: Path, cache: str) -> dict[str, Any]:
    """A prompt of 9 and 4 tokens and two decode steps, with an empty cache."""
    import numpy as np

    from gqa_export.bundle.manifest import read_manifest
    from gqa_export.graph_io import past_names
    from gqa_export.runtime.feeds import attention_mask

    spec, random = read_manifest(folder).spec, np.random.default_rng(5)
    data: dict[str, Any] = {"steps": np.array(3)}
    lengths, axis = np.zeros(2, np.int64), 0
    for step, new in enumerate((np.array([9, 4]), np.array([1, 1]), np.array([1, 1]))):
        data[f"ids/{step}"] = random.integers(3, spec.vocabulary, (2, int(new.max())))
        past = axis if cache == "growing" else int(lengths.max())
        data[f"mask/{step}"] = attention_mask(lengths, new, past, int(new.max()))
        lengths, axis = lengths + new, axis + int(new.max())
    for layer in spec.layers:
        for name, size in zip(past_names(layer.layer), (layer.head_size, layer.value_head_size)):
            room = CAPACITY if cache == "static" else 0
            data[f"past/{name}"] = np.zeros((2, layer.kv_num_heads, room, size), np.float32)
    return data


def make_environment(version: str) -> Path:
    """A Python with this release of onnxruntime, numpy and nothing else."""
    folder = ROOT / "build" / NAME / version
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-compile", f"onnxruntime=={version}", "numpy"],
                   check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"})
    return python


def run(python: Path, model: Path, given: Path, out: Path) -> dict[str, str]:
    """What a release says of a bundle: its version, and why it refuses it ("" if it does not)."""
    done = subprocess.run([python, "-c", RUNNER, model, given, out], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        return {"version": "", "refusal": f"ended with {done.returncode}: {done.stderr[-300:]}"}
    answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answer


def difference(one: Path, other: Path) -> float:
    """Largest difference of the logits of real tokens."""
    import numpy as np

    worst = 0.0
    with np.load(one) as first, np.load(other) as second:
        for step, name in enumerate(first.files):
            for row, length in enumerate((9, 4) if step == 0 else (1, 1)):
                gap = np.abs(first[name][row, :length] - second[name][row, :length]).max()
                worst = max(worst, float(gap)) if np.isfinite(gap) else float("inf")
    return worst


def expected(row: dict[str, Any], version: str) -> str:
    """What a release is expected to do with a bundle: "runs", or words of its refusal."""
    if row["opset"] > OPSETS.get(version, row["opset"]):
        return f"till opset {OPSETS[version]}"
    return KNOWN.get((row["model"], row["target"]), "runs") if version in OPSETS else "runs"


def sound(row: dict[str, Any]) -> bool:
    """Whether every release did with a bundle what is expected of it."""
    for version, answer in row["runtimes"].items():
        wanted = expected(row, version)
        if wanted == "runs" and (answer["refusal"] or answer["difference"] > TOLERANCE):
            return False
        if wanted != "runs" and wanted not in answer["refusal"]:
            return False
    return True


def measure(work: Path, pythons: dict[str, Path]) -> list[dict[str, Any]]:
    """Export every sample and let every release run it; the last is the one that the others are held against."""
    import gqa_models
    import numpy as np

    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx

    rows, shapes = [], structures()
    for number, sample in enumerate(SAMPLES):
        name, overrides, target, cache, purpose = sample
        checkpoint, bundle, given = (work / f"{number}{end}" for end in ("-checkpoint", "-bundle", "-feeds.npz"))
        gqa_models.write_tiny(name, checkpoint, **overrides)
        export_onnx(checkpoint, bundle, ExportOptions(target=target, cache=cache, capacity=CAPACITY, dtype="fp32",
                                                      logits="all"))
        np.savez(given, **feeds(bundle, cache))
        row = {"sample": label(sample), "model": name, "target": target, "cache": cache, "purpose": purpose,
               **shapes[label(sample)], "runtimes": {}}
        outputs = {version: work / f"{number}-{version}.npz" for version in pythons}
        for version, python in pythons.items():
            answer = run(python, bundle / "model.onnx", given, outputs[version])
            if answer["version"] != version:
                raise RuntimeError(f"the environment of {version} answered as {answer['version']}: {answer['refusal']}")
            row["runtimes"][version] = {"refusal": answer["refusal"].replace(str(work), "")}
        for version, answer in row["runtimes"].items():
            if not answer["refusal"]:
                answer["difference"] = difference(outputs[version], outputs[next(reversed(pythons))])
        print(json.dumps(row))
        rows.append(row)
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    versions = report["versions"]
    lines = ["# Releases of ONNX Runtime that load the bundles", "",
             f"{report['date']}, {report['machine']}. Made by `scripts/{NAME}.py`: tiny models in fp32, a prompt of "
             "two rows (one padded) and two decode steps. Figures are the largest difference of the logits from those "
             f"of onnxruntime {versions[-1]}; *refused* where the release does not load the bundle.", "",
             f"| bundle | for | opset | IR version | {' | '.join(versions)} |",
             "|---|---|---|---|" + "---|" * len(versions)]
    for row in report["rows"]:
        cells = [f"refused: {expected(row, version)}" if answer["refusal"] else f"{answer['difference']:.1e}"
                 for version, answer in row["runtimes"].items()]
        lines.append(f"| {row['sample']} | {row['purpose']} | {row['opset']} | {row['ir_version']} | "
                     f"{' | '.join(cells)} |")
    lines += ["", "*till opset*: Attention is new in opset 23, TensorScatter in 24; use `--target ort` or `portable`.",
              "*input size 12*: the release's GroupQueryAttention takes no attention sinks; use `--target portable`."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Make the environments, measure, write down."""
    pythons = {version: make_environment(version) for version in (*OLD, newest())}
    with tempfile.TemporaryDirectory(prefix="gqa-runtimes-") as place:
        rows = measure(Path(place), pythons)
    report = {"date": datetime.date.today().isoformat(),
              "machine": f"{platform.machine()}, {platform.system()}, CPU, Python {platform.python_version()}",
              "versions": list(pythons), "passed": all(map(sound, rows)), "rows": rows}
    (OUT / f"{NAME}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (OUT / f"{NAME}.md").write_text(markdown(report), encoding="utf-8")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
