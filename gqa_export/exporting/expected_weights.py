"""The order of `model.onnx.data`, told from names before anything is traced, so that it can be written meanwhile
(`weights.ahead`).

It is a prediction, for models whose weights are called as Llama's are; the graph decides. Whatever makes another order
likely (options, names, forms of weights) is left to the ordinary way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..graph_io import RECIPE
from ..targets import get_target
from ..weights.source_kinds import StoredSource
from ..weights.streams import ALIGNMENT, Stream

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint
    from .options import ExportOptions

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
WEIGHTS, BIASES = (tuple(f"self_attn.{name}.{part}" for name in PROJECTIONS) for part in ("weight", "bias"))
Q_NORM = "self_attn.q_norm.weight"
LAYER = (
    ("input_layernorm.weight",),
    WEIGHTS,
    BIASES,
    ("self_attn.qkv_proj.weight",),
    (Q_NORM,),
    ("self_attn.k_norm.weight",),
    ("self_attn.o_proj.weight",),
    ("self_attn.o_proj.bias",),
    ("post_attention_layernorm.weight",),
    *((f"mlp.{name}.{part}",) for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
      for part in ("weight", "bias")),
)
"""what a layer's nodes read, in their order; what lies in one row is joined, but projections only where no norm lies
between them and attention"""
ALWAYS = ("input_layernorm.weight", "self_attn.o_proj.weight", "post_attention_layernorm.weight",
          "mlp.down_proj.weight")
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def expected_streams(checkpoint: Checkpoint, options: ExportOptions, dtype: str) -> list[Stream]:
    """The streams that an export will most likely write; [] where that cannot be told.

    Args:
        checkpoint: that is exported.
        options: of the export.
        dtype: the numpy (ml_dtypes) name of the weights' type in the graph.
    """
    config, stored = checkpoint.config, checkpoint.tensors
    plain = checkpoint.kind == "hf" and checkpoint.model is None and checkpoint.adapter is None and \
        not checkpoint.quantized and not checkpoint.packed
    usual = get_target(options.target).packed_projections and options.weights == "copy" and \
        options.quantize == "keep" and options.tensor_parallel == 1 and options.long is None and \
        not options.lora and not options.merge_lora and not options.kv_cache
    if not (plain and usual):
        return []
    groups = _groups(stored, config.get("num_hidden_layers"))
    if groups is None or (HEAD in stored and config.get("tie_word_embeddings")):
        return []
    streams: list[Stream] = []
    offset = 0
    for group in groups:
        offset += -offset % ALIGNMENT
        streams.append(Stream(RECIPE + "+".join(group), tuple(StoredSource(stored[name]) for name in group), dtype, [],
                              offset))
        offset += streams[-1].nbytes
    return streams


def _groups(stored: Iterable[str], depth: object) -> list[tuple[str, ...]] | None:
    """Names of weights in the order of the graph, those that are joined together; None if there are others."""
    names = set(stored)
    if not isinstance(depth, int) or depth > len(names):
        return None
    apart = {WEIGHTS} if f"model.layers.0.{Q_NORM}" in names else set()
    layer = [part for group in LAYER for part in ([(name,) for name in group] if group in apart else [group])]
    groups = [(EMBEDDING,), *(tuple(f"model.layers.{place}.{name}" for name in group)
                              for place in range(depth) for group in layer), (NORM,), (HEAD,)]
    there = [group for group in groups if names.issuperset(group)]
    usual = names.issuperset(f"model.layers.{place}.{name}" for place in range(depth) for name in ALWAYS)
    return there if usual and {name for group in there for name in group} == names else None
