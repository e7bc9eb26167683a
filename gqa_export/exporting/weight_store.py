"""Where every weight of a traced model is: as it is stored, dequantized, or merged one at a time."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import TYPE_CHECKING

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.load_config import load_config
from ..checkpoint.load_model import load_model
from ..checkpoint.quiet import quiet
from ..weights.dtypes import itemsize
from ..weights.memory_budget import Budget
from ..weights.sources import WeightStore

if TYPE_CHECKING:
    from ..trace.traced import Traced


def wanted_weights(traced: Traced) -> dict[str, tuple[int, ...]]:
    """Name and shape of each weight that the canonical graph uses."""
    from ..graph_io import RECIPE
    from ..weights.sources import recipe_of

    return {recipe_of(tensor).removeprefix(RECIPE): tuple(tensor.dims)
            for tensor in traced.model.graph.initializer if recipe_of(tensor)}


def used_names(traced: Traced) -> set[str]:
    """Names of the graph's weights, and those of tied weights in all their names."""
    return {*wanted_weights(traced), *(name for group in traced.tied for name in group)}


def weight_store(checkpoint: Checkpoint, traced: Traced, budget: Budget) -> WeightStore:
    """Where every weight of a traced model is. What transformers merges or splits on load is made when it is written;
    the checkpoint is loaded only if that cannot be told from names and shapes. `budget` must have room for either."""
    from ..weights.source_kinds import StoredSource

    wanted = wanted_weights(traced)
    if checkpoint.quantized or checkpoint.values_alone:
        store = WeightStore.from_codes(checkpoint, wanted, traced.tied)
        if all(name in store and store.sources[name].shape == shape for name, shape in wanted.items()):
            return store
        return _with_values(checkpoint, store, wanted, budget)
    stored = checkpoint.tensors
    aliases = _aliases(traced, stored)
    plain = not traced.converts and all(
        (real := aliases.get(name, name)) in stored and stored[real].shape == shape for name, shape in wanted.items())
    if plain:
        return WeightStore({name: StoredSource(tensor) for name, tensor in stored.items()}, aliases)
    if checkpoint.model is not None:
        return WeightStore.from_module(checkpoint, checkpoint.model)
    # an adapter is merged into what is stored, or by loading: not into what is made on the way
    streams = stored and not checkpoint.quantized and checkpoint.adapter is None
    streamed = _converted(checkpoint, traced, wanted, budget) if streams else None
    if streamed is not None:
        return streamed
    budget.need(_elements(wanted) * itemsize(checkpoint.stored_dtype), "loading the model (its tensors are "
                "dequantized, or merged in a way that cannot be streamed)")
    return WeightStore.from_module(checkpoint, load_model(checkpoint, "auto"))


def _with_values(checkpoint: Checkpoint, codes: WeightStore, wanted: dict[str, tuple[int, ...]],
                 budget: Budget) -> WeightStore:
    """Codes where they are the model's own weights, and values for the rest, which the loaded model has."""
    from ..weights.source_kinds import DequantizedSource

    budget.need(_elements(wanted) * itemsize(checkpoint.stored_dtype), "loading the model (some of its quantized "
                "tensors are merged in a way that codes cannot be)")
    store = WeightStore.from_module(checkpoint, load_model(checkpoint, "auto"))
    store.left = codes.left
    for name, shape in wanted.items():
        source = codes.sources.get(name)
        if isinstance(source, DequantizedSource) and source.shape == shape:
            store.add(name, source)
    return store


def _elements(wanted: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in wanted.values())


def _aliases(traced: Traced, there: Container[str]) -> dict[str, str]:
    """Of tied weights, the names that are not there -> one that is."""
    found = {}
    for group in traced.tied:
        known = [name for name in group if name in there]
        found.update({name: known[0] for name in group if known and name not in there})
    return found


def _converted(checkpoint: Checkpoint, traced: Traced, wanted: dict[str, tuple[int, ...]],
               budget: Budget) -> WeightStore | None:
    """The weights that transformers would load, made one at a time; None where some are not found so."""
    import torch

    from ..trace import skeleton
    from ..weights.loaded import loaded

    config = load_config(checkpoint)
    with quiet():
        model = skeleton.build(config, getattr(torch, checkpoint.stored_dtype), device="meta")
    found = loaded(checkpoint.tensors, model)
    if found is None:
        return None
    aliases = _aliases(traced, found.sources)
    if any((real := aliases.get(name, name)) not in found.sources or found.sources[real].shape != shape
           for name, shape in wanted.items()):
        return None
    budget.need(found.largest, "converting a weight")
    return WeightStore(found.sources, aliases)
