"""What a bundle says of itself: its manifest, and genai_config.json where onnxruntime-genai can load it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from .. import graph_io
from ..bundle.manifest import Manifest, Tokens
from ..checkpoint.tokenizer import token_ids
from ..compare.suite import VERIFY_WIDTH
from ..environment.versions import versions
from ..targets import get_target
from . import genai_config
from .options import ExportOptions

if TYPE_CHECKING:
    from ..bundle.quantization import Quantization
    from ..bundle.writer import BundleWriter
    from ..checkpoint.checkpoint import Checkpoint
    from ..lowering.context import Lowered
    from ..spec import KvCache, WindowCache
    from ..trace.traced import Traced
    from ..weights.layout import Placement

RECORDED = ("gqa-export", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnx-graphsurgeon")
"""the packages whose versions decide what an export writes"""


def manifest_of(checkpoint: Checkpoint, traced: Traced, lowered: Lowered, options: ExportOptions, dtype: str,
                has_tokenizer: bool, quantization: Quantization | None = None, kv: KvCache | None = None,
                windows: WindowCache | None = None, needs: str = "") -> Manifest:
    """The manifest of an export; the writer adds the files. needs: the first onnxruntime that runs its layers."""
    target = get_target(options.target)
    needed = target.ragged_chunks_need if options.ragged_chunks else needs  # which is earlier
    axis = traced.capacity if target.literal_capacity else graph_io.CAPACITY
    return Manifest(
        target=options.target, dtype=dtype, cache=options.cache, capacity=traced.capacity, logits=options.logits,
        weights=options.weights, spec=traced.spec,
        inputs=graph_io.graph_inputs(traced.spec, dtype, options.cache, target.interface, axis, kv, windows),
        outputs=graph_io.graph_outputs(traced.spec, dtype, options.cache, options.logits, axis, kv,
                                       options.hidden_states, windows),
        fallbacks=lowered.fallbacks,
        source={"checkpoint": checkpoint.source, "kind": "memory" if checkpoint.model is not None else checkpoint.kind,
                "revision": checkpoint.revision, "dtype": checkpoint.stored_dtype,
                "rope_regime": traced.rope_regime, "traced_layers": traced.traced_layers,
                "text_only": checkpoint.text_only},
        tokens=cast(Tokens, {**token_ids(checkpoint), "tokenizer": has_tokenizer}),
        versions=versions(RECORDED, absent="unknown"), quantization=quantization, kv_cache=kv, window_cache=windows,
        ragged_chunks=options.ragged_chunks,
        needs={"onnxruntime": needed} if needed else {},
        verify_width=min(VERIFY_WIDTH, traced.capacity, windows.chunk if windows else VERIFY_WIDTH)
        if options.logits == "all" else 1)


def with_bytes(manifest: Manifest, placement: Placement) -> Manifest:
    """The manifest with how many bytes of weights were written, and how many are used where they are."""
    return replace(manifest, bytes_copied=placement.bytes_copied, bytes_linked=placement.bytes_linked)


def add_genai(writer: BundleWriter, manifest: Manifest, provider: str, notes: list[str]) -> None:
    """Write genai_config.json, or note why onnxruntime-genai cannot load this bundle."""
    reason = genai_config.misfit(manifest)
    if reason:
        notes.append(f"{genai_config.FILE} was not written: {reason}")
        return
    if manifest.long:
        notes.append("onnxruntime-genai runs model.onnx alone, which is exact: it has one graph for prompts and steps")
    if manifest.spec.rope_switch:
        notes.append("onnxruntime-genai does not feed a sequence again where it grows beyond "
                     f"{manifest.spec.rope_switch} tokens: let it generate below that length, or from a prompt "
                     "beyond it")
    config = genai_config.genai_config(manifest, provider)
    writer.write(genai_config.FILE, (json.dumps(config, indent=1) + "\n").encode())
