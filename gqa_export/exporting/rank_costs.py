"""What a model costs on each of N devices, for it and for it as MQA and MHA, from its traced graph; no weight is read.

With one key/value head (MQA) every device holds that head: its cache does not shrink with N. With as many as devices
(GQA) each holds its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import onnx

from ..bundle.manifest import MANIFEST
from ..checkpoint.open import open_checkpoint
from ..describe.inspection import with_kv_heads
from ..errors import GqaExportError
from ..progress import silent
from ..sharding.facts import held_heads
from ..sharding.plan import Plan
from ..sharding.shard import shard
from ..spec import ModelSpec
from ..targets import get_target
from ..weights.dtypes import itemsize
from .options import ExportOptions
from .prepare import traced_model

TARGET = "trt-plugin"


@dataclass(frozen=True)
class RankCost:
    """What the device costs that holds most. kind: "this model", "as MQA" or "as MHA". kv_heads: of one layer.
    cache_bytes_per_token: of one sequence, all layers. weight_bytes: of this device; whole_*: without a cut."""

    kind: str
    ranks: int
    kv_heads: int
    cache_bytes_per_token: int
    weight_bytes: int
    whole_cache_bytes_per_token: int
    whole_weight_bytes: int


def rank_costs(source: str | Path, ranks: int, revision: str | None = None) -> tuple[RankCost, ...]:
    """The costs of each device.

    Args:
        source: checkpoint folder, hub id or .gguf file.
        ranks: 2 or more.
        revision: of a hub id.

    Raises:
        UnsupportedModel: the model cannot be cut.
        GqaExportError: the source is a bundle.
    """
    from ..lowering.context import LowerOptions

    if (Path(source) / MANIFEST).is_file():
        raise GqaExportError("what ranks would cost is told of a checkpoint, and this is a bundle", str(source),
                             "pass the checkpoint it was exported from", code="E-OPTION-TENSOR-PARALLEL")
    checkpoint, target = open_checkpoint(source, revision=revision), get_target(TARGET)
    options = ExportOptions(TARGET, cache="static", logits="last", trace_cache=False)
    dtype = checkpoint.stored_dtype if checkpoint.stored_dtype in target.dtypes["tensorrt"] else "float32"
    traced, _, _ = traced_model(checkpoint, options, dtype, target, silent)
    lowering = LowerOptions(TARGET, "static", traced.capacity, "last")
    plan = shard(traced.model, traced.spec, lowering, ranks).plan
    own = max(_weight_bytes(plan, rank) for rank in range(ranks))
    whole = _weight_bytes(plan, None)
    found = []
    for kind, spec in (("this model", traced.spec), ("as MQA", with_kv_heads(traced.spec, shared=True)),
                       ("as MHA", with_kv_heads(traced.spec, shared=False))):
        cut = _cut(spec, ranks)
        size = itemsize(dtype)
        found.append(RankCost(kind, ranks, max(layer.kv_num_heads for layer in cut.layers),
                              cut.cache_bytes_per_token(size),
                              own + _projections(cut, size) - _projections(_cut(traced.spec, ranks), size),
                              spec.cache_bytes_per_token(size),
                              whole + _projections(spec, size) - _projections(traced.spec, size)))
    return tuple(found)


def _cut(spec: ModelSpec, ranks: int) -> ModelSpec:
    """The model with the K/V heads of one rank."""
    return replace(spec, layers=tuple(replace(layer, kv_num_heads=len(held_heads(layer, ranks)[0]))
                                      for layer in spec.layers))


def _projections(spec: ModelSpec, size: int) -> int:
    """Bytes of the matrices that give keys and values, hidden size times heads times head sizes."""
    return sum(layer.kv_num_heads * (layer.head_size + layer.value_head_size) * spec.hidden_size * size
               for layer in spec.owners)


def _weight_bytes(plan: Plan, rank: int | None) -> int:
    """Bytes of the weights of a rank; None: of the whole."""
    total = 0
    head = plan.view.made_by[plan.head.input[1]].input[0] if plan.head is not None else ""
    for name, tensor in plan.view.initializers.items():
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        size = prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        cut = plan.cuts.get(name)
        readers = len(plan.view.read_by.get(name, ()))
        if rank is None or (cut is None and name != head):
            total += size
        elif cut is not None:
            total += size * cut.size(rank) // tensor.dims[cut.axis]
        else:  # a head that is the embedding too is there whole already
            (start, stop), = plan.vocabulary[rank]
            total += size if readers > 1 else size * (stop - start) // tensor.dims[0]
    return total
