"""llama.cpp as the judge of what is read from GGUF files.

    python scripts/llama_cpp_check.py --python ENV/bin/python        # writes docs/benchmarks/llama_cpp.json and .md

Every case of tests/gguf_models.py is written as a file, exported (`ort`, fp32) and run in ONNX Runtime token after
token; llama.cpp reads the same file in an environment of its own and decodes the same tokens. `--python` is the Python
of an environment with llama-cpp-python (`pip install llama-cpp-python` compiles it, in minutes); it needs nothing of
this package. `--model MODEL.gguf` adds a real model: its tensors are written again in float32, because llama.cpp rounds
what it multiplies with quantized weights.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
RESULT = ROOT / "docs" / "benchmarks" / "llama_cpp.json"
IDS = [3, 17, 5, 60, 22, 9, 41, 7, 8, 30, 12, 2, 1, 55, 20]
FIRST = 9
ALLOWED = 1e-3
"""largest difference of logits whose standard deviation is 1.5 to 4: two programs in float32; the smallest fault that
is known of the kind changes them by 5e-3. llama.cpp looks GELU up in a table of float16: where a model has it, twice
what that changes in the NumPy decoder of the tests is added."""
SHORT = {"phi3": (5, "llama.cpp has no attention window for Phi 3, transformers has: 5 tokens, the window is 6")}
LEFT_OUT = {"llama YaRN factors": "llama.cpp does not read YaRN's factors for this architecture, transformers does"}
CHANGED = {"phi3 LongRoPE": {"rope.scaling.original_context_length": 8}}
"""llama.cpp chooses the table by the size of its context, which is a multiple of 256: the long one"""
JUDGED = ("gqa_export/checkpoint/gguf_config.py", "gqa_export/checkpoint/gguf_facts.py",
          "gqa_export/checkpoint/gguf_families.py", "gqa_export/checkpoint/gguf_keys.py",
          "gqa_export/checkpoint/gguf_names.py", "gqa_export/checkpoint/gguf_rope.py",
          "gqa_export/checkpoint/gguf_tensors.py", "tests/gguf_models.py")
"""the sources that the result is about"""
CHILD = r"""
import ctypes, json, sys
import numpy as np
import llama_cpp as c
c.llama_backend_init()
silent = c.llama_log_callback(lambda *_: None)  # kept: llama.cpp calls it later
c.llama_log_set(silent, ctypes.c_void_p(0))
for job in json.load(sys.stdin):
    model = c.llama_model_load_from_file(job["file"].encode(), c.llama_model_default_params())
    if not model:
        print(json.dumps({"name": job["name"], "error": "llama.cpp cannot load the file"}), flush=True)
        continue
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 256, 64, 64, 1, 1
    params.type_k = params.type_v = 0
    params.flash_attn_type = 0
    context = c.llama_init_from_model(model, params)
    rows = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    found, at, ids, first = [], 0, job["ids"], job["first"]
    batch = c.llama_batch_init(64, 0, 1)
    for part in [ids[:first], *([one] for one in ids[first:])]:
        batch.n_tokens = len(part)
        for place, token in enumerate(part):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, at + place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        assert c.llama_decode(context, batch) == 0
        at += len(part)
        found.append(np.ctypeslib.as_array(c.llama_get_logits(context), (len(part), rows)).copy())
    np.save(job["output"], np.concatenate(found))
    c.llama_batch_free(batch)
    c.llama_free(context)
    c.llama_model_free(model)
    print(json.dumps({"name": job["name"], "version": c.__version__}), flush=True)
"""


def sources_hash() -> str:
    """sha256 of the sources that the result is about."""
    found = hashlib.sha256()
    for name in JUDGED:
        found.update((ROOT / name).read_bytes())
    return found.hexdigest()


def write_float32(source: Path, path: Path) -> Path:
    """A GGUF file again, with every tensor in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def run(python: str, model: Path | None, folder: Path) -> dict[str, Any]:
    """The result: a row for each case."""
    from gguf_models import CASES, write_case
    from gguf_run import exported_logits

    judged, jobs = sources_hash(), []
    for number, name in enumerate(name for name in CASES if name not in LEFT_OUT):
        (folder / str(number)).mkdir()
        file = write_case(folder / str(number) / "model.gguf", name, CHANGED.get(name, {}),
                          tokens={"tokenizer.ggml.model": "no_vocab"}, vocabulary=True)
        length = SHORT.get(name, (len(IDS), ""))[0]
        jobs.append({"name": name, "file": str(file), "ids": IDS[:length], "first": min(FIRST, length),
                     "output": str(folder / f"{number}.npy")})
    if model is not None:
        (folder / "model").mkdir()
        jobs.append({"name": model.name, "file": str(write_float32(model, folder / "model" / "model.gguf")),
                     "ids": [504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282, 7016, 314], "first": FIRST,
                     "output": str(folder / "model.npy")})
    child = subprocess.run([python, "-c", CHILD], input=json.dumps(jobs), capture_output=True, text=True, check=False)
    if child.returncode:
        raise SystemExit(f"llama.cpp failed ({child.returncode}):\n{child.stderr[-2000:]}")
    said = {row["name"]: row for row in map(json.loads, child.stdout.splitlines())}
    rows = []
    for job in jobs:
        note = SHORT.get(job["name"], (0, ""))[1]
        row: dict[str, Any] = {"case": job["name"], "tokens": len(job["ids"]), "note": note}
        if "error" in said[job["name"]]:
            row |= {"error": said[job["name"]]["error"], "passed": False}
        else:
            ours = exported_logits(Path(job["file"]), folder / "bundles" / job["name"].replace(" ", "_"), job["ids"],
                                   job["first"], 64)
            theirs = np.load(job["output"])
            difference = float(np.abs(ours - theirs).max())
            allowed = ALLOWED + 2 * effect_of_half_gelu(job)
            row |= {"difference": float(f"{difference:.2e}"), "allowed": float(f"{allowed:.2e}"),
                    "spread": round(float(theirs.std()), 2), "passed": difference < allowed}
        rows.append(row)
        print(row, flush=True)
    rows += [{"case": name, "left_out": why} for name, why in LEFT_OUT.items()]
    version = next(row["version"] for row in said.values() if "version" in row)
    return {"date": datetime.date.today().isoformat(), "machine": f"{platform.system()} {platform.machine()}",
            "llama_cpp_python": version, "allowed": ALLOWED, "sources": judged, "versions": versions(),
            "rows": rows}


def effect_of_half_gelu(job: dict[str, Any]) -> float:
    """What a table of float16 for GELU changes, of a case of the tests."""
    from gguf_judge import Judge
    from gguf_models import CASES

    if job["name"] not in CASES:
        return 0.0
    plain, rounded = (Judge(Path(job["file"]), half_gelu=rounded).logits(job["ids"]) for rounded in (False, True))
    return float(np.abs(plain - rounded).max())


def versions() -> dict[str, str]:
    """The packages that decide what is compared."""
    from importlib import metadata

    return {name: metadata.version(name) for name in ("gguf", "torch", "transformers", "onnxruntime")}


def page(result: dict[str, Any]) -> str:
    """docs/benchmarks/llama_cpp.md."""
    lines = ["# GGUF files, judged by llama.cpp", "",
             f"{result['date']}, {result['machine']}, llama-cpp-python {result['llama_cpp_python']}, "
             + ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + ".",
             "Each file is exported (`ort`, fp32) and decoded token after token in ONNX Runtime and in llama.cpp, in",
             f"float32. The largest difference of a logit may be {result['allowed']:g}; where a model has GELU, which",
             "llama.cpp looks up in a table of float16, twice what that changes is added. The real model's tensors are",
             "written in float32 first. Made by `scripts/llama_cpp_check.py`.", "",
             "| file | tokens | difference | allowed | spread of the logits | |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        if "left_out" in row:
            lines.append(f"| {row['case']} | | | | | not compared: {row['left_out']} |")
        elif "error" in row:
            lines.append(f"| {row['case']} | | | | | {row['error']} |")
        else:
            verdict = "" if row["passed"] else "**different** "
            lines.append(f"| {row['case']} | {row['tokens']} | {row['difference']:.1e} | {row['allowed']:.1e} | "
                         f"{row['spread']} | {verdict}{row['note']} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--model", type=Path, help="a GGUF file to compare too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(arguments.python, arguments.model, Path(folder))
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    RESULT.with_suffix(".md").write_text(page(result), encoding="utf-8")
    return 0 if all(row.get("passed", True) for row in result["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
