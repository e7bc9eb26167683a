"""A checkpoint of a published model's shape whose weights are holes: full size on paper, kilobytes on disk.

    python scripts/sparse_checkpoint.py llama-3.1-405b FOLDER [--layers N] [--dtype bfloat16]

Shards are sparse safetensors files of at most 5 GB, every weight zero (`--fill`: seeded random bits instead, which
do take their room on disk). No tokenizer. Shapes come from `models/shapes.toml`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import click
import gqa_models

SHARD_BYTES = 5 * 10**9
TYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
CHUNK_ELEMENTS = 1 << 22


def shards(shapes: dict[str, tuple[int, ...]], width: int) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in order, cut where a shard is full."""
    shard, size = [], 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * width
        if shard and size + nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((name, shape))
        size += nbytes
    yield shard


def write_sparse(name: str, folder: Path, *, layers: int = 0, dtype: str = "bfloat16", fill: bool = False) -> int:
    """Write the checkpoint of shape `name` with so many layers (0: its own); returns the bytes of its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = gqa_models.shape(name)
    if layers:
        values["num_hidden_layers"] = layers
    config = AutoConfig.for_model(**values)
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in tied}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    kind, width = TYPES[dtype]
    parts, index, total = list(shards(shapes, width)), {}, 0
    for number, shard in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        total += _write_shard(folder / file, shard, kind, width, fill, number)
        index.update({key: file for key, _ in shard})
    if len(parts) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    return total


def _write_shard(path: Path, shard: list[tuple[str, tuple[int, ...]]], kind: str, width: int, fill: bool,
                 seed: int) -> int:
    header, place = {}, 0
    for name, shape in shard:
        end = place + math.prod(shape) * width
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if fill:
            _fill(file, place // width, kind, seed)
        file.truncate(8 + len(text) + place)
    return place


def _fill(file, elements: int, kind: str, seed: int) -> None:
    """Seeded random values of about 0.02, a few million at a time."""
    import ml_dtypes
    import numpy as np

    types = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
    random = np.random.default_rng(seed)
    for start in range(0, elements, CHUNK_ELEMENTS):
        values = random.standard_normal(min(CHUNK_ELEMENTS, elements - start), dtype=np.float32) * 0.02
        file.write(values.astype(types[kind]).tobytes())


@click.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", default=0, help="Fewer or more layers than the model has.")
@click.option("--dtype", default="bfloat16", type=click.Choice(list(TYPES)), show_default=True)
@click.option("--fill", is_flag=True, help="Random weights that take their room on disk.")
def main(name: str, folder: Path, layers: int, dtype: str, fill: bool) -> None:
    """Write a checkpoint of shape NAME into FOLDER."""
    total = write_sparse(name, folder, layers=layers, dtype=dtype, fill=fill)
    click.echo(f"{folder}: {total / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
