"""One rank of a bundle, seen as a bundle of its own: its folder and a manifest with its heads and its own tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .. import graph_io
from ..targets import get_target
from .manifest import Manifest


def rank_manifest(manifest: Manifest, rank: int) -> Manifest:
    """The manifest of one rank's graph or engine."""
    assert manifest.parallel is not None
    facts = manifest.parallel.ranks[rank]
    held = {heads.layer: heads for heads in facts.heads}
    spec = replace(manifest.spec, layers=tuple(
        replace(layer, num_heads=held[layer.layer].queries, kv_num_heads=len(held[layer.layer].kv))
        for layer in manifest.spec.layers))
    target, prefix = get_target(manifest.target), f"{facts.folder}/"
    axis = manifest.capacity if target.literal_capacity else graph_io.CAPACITY
    return replace(
        manifest, parallel=None, spec=spec, bytes_copied=facts.bytes_copied, bytes_linked=facts.bytes_linked,
        inputs=graph_io.graph_inputs(spec, manifest.dtype, manifest.cache, target.interface, axis),
        outputs=graph_io.graph_outputs(spec, manifest.dtype, manifest.cache, manifest.logits, axis),
        files={name.removeprefix(prefix): fact for name, fact in manifest.files.items() if name.startswith(prefix)})


def ranks_of(folder: Path, manifest: Manifest) -> list[tuple[str, Path, Manifest]]:
    """Every graph of a bundle: what its files begin with ("rank0/", or ""), its folder and its manifest."""
    if manifest.parallel is None:
        return [("", folder, manifest)]
    return [(f"{facts.folder}/", folder / facts.folder, rank_manifest(manifest, number))
            for number, facts in enumerate(manifest.parallel.ranks)]
