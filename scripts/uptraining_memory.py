"""How much memory converting a 7B-shaped checkpoint takes: a process of its own, its peak resident memory.

    python scripts/uptraining_memory.py --work FOLDER --out docs/benchmarks

Makes a bf16 checkpoint of Llama-2-7B's shape in --work (keys and values hold one random matrix, the rest is a hole in
a sparse file), converts 32 -> 8 key/value heads with `mean`, removes both. Needs 17 GB of disk. Writes
uptraining_memory.json.
"""

from __future__ import annotations

import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import click

HIDDEN, MLP, LAYERS, HEADS, VOCABULARY = 4096, 11008, 32, 32, 32000
KV_HEADS = 8
SHARDS = 3
LIMIT_GB = 2.0


def tensors(depth: int) -> list[dict[str, list[int]]]:
    """Name -> shape, by shard."""
    shards: list[dict[str, list[int]]] = [{} for _ in range(SHARDS)]
    shards[0]["model.embed_tokens.weight"] = [VOCABULARY, HIDDEN]
    for layer in range(depth):
        shard, name = shards[layer * SHARDS // depth], f"model.layers.{layer}"
        shard.update({f"{name}.self_attn.{role}_proj.weight": [HIDDEN, HIDDEN] for role in "qkvo"})
        shard.update({f"{name}.mlp.gate_proj.weight": [MLP, HIDDEN], f"{name}.mlp.up_proj.weight": [MLP, HIDDEN],
                      f"{name}.mlp.down_proj.weight": [HIDDEN, MLP], f"{name}.input_layernorm.weight": [HIDDEN],
                      f"{name}.post_attention_layernorm.weight": [HIDDEN]})
    shards[-1].update({"model.norm.weight": [HIDDEN], "lm_head.weight": [VOCABULARY, HIDDEN]})
    return shards


def write_sparse(folder: Path, depth: int) -> int:
    """The checkpoint; its size in bytes."""
    import torch
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=depth,
                         num_attention_heads=HEADS, num_key_value_heads=HEADS, vocab_size=VOCABULARY,
                         architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    places, total = {}, 0
    random = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    content = random.view(torch.uint8).numpy().tobytes()
    for number, shard in enumerate(tensors(depth)):
        file_name = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        header, place = {}, 0
        for name, shape in shard.items():
            count = 2
            for size in shape:
                count *= size
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + count]}
            place += count
            places[name] = file_name
        text = json.dumps(header).encode()
        with open(folder / file_name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + place)
            for name in [name for name in shard if "k_proj" in name or "v_proj" in name]:
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(content)
        total += place
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


@click.command()
@click.option("--work", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--layers", type=click.IntRange(1), default=LAYERS, show_default=True)
def main(work: Path, out: Path, layers: int) -> None:
    """Make, convert, measure; exit 1 if the limit is passed."""
    source, output = work / "7b", work / "7b-gqa"
    for folder in (source, output):
        shutil.rmtree(folder, ignore_errors=True)
    size = write_sparse(source, layers)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "gqa_export", "convert", str(source), "-o", str(output), "--kv-heads",
                    str(KV_HEADS), "--method", "mean", "--json", str(work / "report.json")], check=True)
    seconds = time.perf_counter() - started
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    written = sum(path.stat().st_size for path in output.iterdir())
    conversion = json.loads((work / "report.json").read_text())
    report = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {platform.system()}, CPU",
              "versions": {name: version(name) for name in ("torch", "transformers")}, "layers": layers,
              "source_bytes": size,
              "written_bytes": written, "seconds": round(seconds, 1), "peak_rss_gb": round(peak_gb, 3),
              "limit_gb": LIMIT_GB, "kv_heads": [HEADS, KV_HEADS], "method": "mean",
              "cache_bytes_per_token": [conversion["cache_bytes_before"], conversion["cache_bytes"]]}
    for folder in (source, output):
        shutil.rmtree(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / "uptraining_memory.json").write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps(report))
    raise SystemExit(0 if peak_gb < LIMIT_GB else 1)


if __name__ == "__main__":
    main()
