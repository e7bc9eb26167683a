"""Compile and run the C++ programs for `ort` bundles, and hold their tokens against Python's.

    python scripts/ort_cpp_example.py --ort-include FOLDER --genai-include FOLDER     -> docs/benchmarks/ort_cpp.json

FOLDER: of onnxruntime_cxx_api.h, of ort_genai.h. The libraries are those of the installed wheels, which bring no
headers. The result names the sha256 of the programs, so that a test can tell when it is stale.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "plugins" / "cpp" / "example" / "ort"
RESULT = ROOT / "docs" / "benchmarks" / "ort_cpp.json"
PROGRAMS = ("ort_generate", "genai_generate")
PROMPTS = ((3, 1, 4, 1, 5, 9, 2, 6), (5, 3), (5, 8, 9, 7, 9), (7,))
NEW_TOKENS = 24
MODELS = ("llama", "qwen2", "gemma2")
CACHES = ("fp16", "int8", "int4")
"""number format or codes of caches with which the program of ONNX Runtime's own interface is run too"""


def sources_sha256() -> str:
    """Of the programs and their CMakeLists.txt."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))).hexdigest()


def library(package: str, pattern: str) -> Path:
    """A shared library of an installed wheel."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return next(iter(sorted(Path(next(iter(spec.submodule_search_locations))).glob(pattern))))


def build(folder: Path, ort_include: Path, genai_include: Path) -> dict[str, str]:
    """Both programs, compiled in `folder`; the environment that they run in."""
    ort = library("onnxruntime", "capi/libonnxruntime.so.*")
    (folder / "lib").mkdir(parents=True)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # as programs and genai ask for it
        (folder / "lib" / name).symlink_to(ort)
    settings = {"ORT_INCLUDE": ort_include, "ORT_LIBRARY": folder / "lib" / "libonnxruntime.so",
                "GENAI_INCLUDE": genai_include,
                "GENAI_LIBRARY": library("onnxruntime_genai", "libonnxruntime-genai.so")}
    for command in (["cmake", "-S", SOURCES, "-B", folder, "-DCMAKE_BUILD_TYPE=Release",
                     *(f"-D{name}={value}" for name, value in settings.items())], ["cmake", "--build", folder]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
        if done.returncode:
            raise click.ClickException(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return {**os.environ, "LD_LIBRARY_PATH": str(folder / "lib")}


def run(folder: Path, environment: dict[str, str], program: str, bundle: Path,
        prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The new tokens of each prompt."""
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    done = subprocess.run([str(folder / program), str(bundle), str(NEW_TOKENS), *texts], capture_output=True, text=True,
                          timeout=120, env=environment)
    if done.returncode:
        raise click.ClickException(f"{program}: {done.stderr[-2000:]}")
    return [list(map(int, line.split())) for line in done.stdout.splitlines()]


def alone(bundle: Path, prompt: Sequence[int]) -> list[int]:
    """What our Python session answers, greedily, past any end token."""
    import gqa_export as gqa

    session = gqa.open_bundle(bundle).session(provider="cpu")
    session.reset(1)
    fed, answer = list(prompt), list[int]()
    for _ in range(NEW_TOKENS):
        logits = session.step(np.array([fed], np.int64))[0, len(fed) - 1]
        fed = [int(logits.argmax())]
        answer += fed
    return answer


def compare(folder: Path, environment: dict[str, str], bundle: Path) -> dict[str, bool]:
    """Whether each program gives every prompt the tokens that Python gives it alone: ONNX Runtime's runs them as one
    ragged batch, genai's one by one."""
    expected = [alone(bundle, prompt) for prompt in PROMPTS]
    one_by_one = [run(folder, environment, "genai_generate", bundle, [prompt])[0] for prompt in PROMPTS]
    return {"ort_generate": run(folder, environment, "ort_generate", bundle, PROMPTS) == expected,
            "genai_generate": one_by_one == expected}


def compare_cache(folder: Path, environment: dict[str, str], bundle: Path) -> dict[str, bool]:
    """`compare` of the program of ONNX Runtime's own interface."""
    expected = [alone(bundle, prompt) for prompt in PROMPTS]
    return {"ort_generate": run(folder, environment, "ort_generate", bundle, PROMPTS) == expected}


def tiny_bundle(model: str, folder: Path) -> Path:
    """An `ort` bundle of a tiny model with random weights."""
    from gqa_models import write_tiny

    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx

    export_onnx(write_tiny(model, folder / "checkpoint"), folder / "bundle", ExportOptions(dtype="fp32"))
    return folder / "bundle"


def header_versions(ort_include: Path) -> dict[str, int]:
    """The version of the interface that ONNX Runtime's headers describe."""
    text = (ort_include / "onnxruntime_c_api.h").read_text(encoding="utf-8")
    found = re.search(r"#define ORT_API_VERSION (\d+)", text)
    assert found is not None
    return {"onnxruntime interface": int(found[1])}


def cache_bundle(cache: str, folder: Path) -> Path:
    """An `ort` bundle of a tiny llama whose cache is of fp16, or of codes."""
    from evidence.mutations.quantized_samples import TEXT, write_odd

    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx

    checkpoint = write_odd(folder / "checkpoint")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    options = {"dtype": "fp16"} if cache == "fp16" else {"dtype": "fp32", "kv_cache": cache,
                                                         "calibrate": folder / "text.txt"}
    export_onnx(checkpoint, folder / "bundle", ExportOptions(**options))
    return folder / "bundle"


@click.command()
@click.option("--ort-include", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--genai-include", type=click.Path(exists=True, path_type=Path), required=True)
def main(ort_include: Path, genai_include: Path) -> None:
    """Compile, run, compare; write the result."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = build(folder / "build", ort_include, genai_include)
        for model in MODELS:
            bundle = tiny_bundle(model, folder / model)
            rows.append({"model": model, **compare(folder / "build", environment, bundle)})
            click.echo(rows[-1])
        for cache in CACHES:
            bundle = cache_bundle(cache, folder / cache)
            rows.append({"model": "llama", "cache": cache, **compare_cache(folder / "build", environment, bundle)})
            click.echo(rows[-1])
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    report = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {platform.system()}",
              "compiler": compiler, "headers": header_versions(ort_include),
              "libraries": {"onnxruntime": version("onnxruntime"), "onnxruntime-genai": version("onnxruntime-genai")},
              "prompts": PROMPTS, "new_tokens": NEW_TOKENS, "sources_sha256": sources_sha256(), "rows": rows}
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
