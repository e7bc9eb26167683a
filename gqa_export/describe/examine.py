"""A bundle or a checkpoint -> the facts of its attention layers and its KV cache."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.manifest import MANIFEST, read_manifest
from .inspection import Inspection, inspect_bundle, inspect_checkpoint
from .stored_matrices import stored_matrices

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint


def examine(source: str | Path, *, revision: str | None = None) -> Inspection:
    """Inspect a bundle (a folder with a manifest) or a checkpoint (anything else).

    Args:
        source: bundle folder, checkpoint folder, hub id or .gguf file.
        revision: branch, tag or commit of a hub id; None is the hub's main branch.

    Raises:
        GqaExportError: for a source that cannot be read, and a model that cannot be exported.
    """
    if (Path(source) / MANIFEST).is_file():
        return inspect_bundle(Path(source), read_manifest(source))
    from ..checkpoint.load_config import load_config
    from ..checkpoint.open import open_checkpoint
    from ..trace.probe.layer_probe import probe

    checkpoint = open_checkpoint(source, revision=revision)
    spec = probe(load_config(checkpoint))
    return inspect_checkpoint(str(source), spec, checkpoint.stored_dtype, *stored_in_checkpoint(checkpoint),
                              matrices=stored_matrices(checkpoint))


def stored_in_checkpoint(checkpoint: Checkpoint) -> tuple[int, int]:
    """Elements and bytes of the stored tensors; of a GGUF file, its (quantized) size."""
    if checkpoint.gguf_file is not None:
        from ..checkpoint.gguf_parts import read_gguf

        header = read_gguf(checkpoint.gguf_file)
        return (sum(prod(shape) for _, shape in header.tensors.values()),
                sum(file.stat().st_size for file in header.files))
    tensors, packed = checkpoint.tensors.values(), checkpoint.packed.values()
    elements = sum(prod(shape) for shape in [*(tensor.shape for tensor in tensors),
                                             *(matrix.shape for matrix in checkpoint.quantized.values())])
    return elements, sum(tensor.nbytes for tensor in (*tensors, *packed))
