"""The part of an export that concerns a model cut over ranks: a lowered graph for each, its folder, its facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.manifest import MODEL
from ..bundle.parallel import HeldHeads, ParallelFacts, RankFacts, collective_order, order_sha256, rank_folder
from ..errors import GqaExportError, UnsupportedModel
from ..sharding.collectives import finish_collectives
from ..sharding.second_opinion import refuse_disagreement
from ..sharding.shard import Sharded, shard
from ..weights.layout import Placement, place
from .quantize import KEEP

if TYPE_CHECKING:
    from ..bundle.writer import BundleWriter
    from ..lowering.context import Lowered, LowerOptions
    from ..targets import Target
    from ..trace.traced import Traced
    from ..weights.sources import WeightStore
    from .options import ExportOptions


@dataclass(frozen=True)
class Ranks:
    """A model cut over ranks. lowered: the graph of each."""

    sharded: Sharded
    lowered: tuple[Lowered, ...]


def refuse_ranks(options: ExportOptions, target: Target) -> None:
    """Refuse a number of ranks that cannot be, or with options that have no meaning for them.

    Raises:
        GqaExportError: the target has no collectives, the graph was to be written beside the checkpoint's files, or
            there was to be a graph for long prompts or a cache of codes, or hidden states were to be an output.
        UnsupportedModel: weights are to be quantized: they are not read first.
    """
    if options.tensor_parallel < 1:
        raise GqaExportError(f"--tensor-parallel is {options.tensor_parallel}, expected 1 or more", "--tensor-parallel",
                             "give the number of devices", code="E-OPTION-TENSOR-PARALLEL")
    if options.tensor_parallel == 1:
        return
    if options.long:
        raise GqaExportError("a graph for long prompts is not cut over ranks", "--tensor-parallel, --long-attention",
                             "leave out one of them", code="E-OPTION-TENSOR-PARALLEL")
    if options.kv_cache:
        raise GqaExportError("a cache of codes is not cut over ranks", "--tensor-parallel, --kv-cache",
                             "leave out one of them", code="E-OPTION-TENSOR-PARALLEL")
    if not target.engine:
        raise GqaExportError(f"target {target.name} runs on one device: ONNX Runtime has no collectives in its wheels",
                             "--tensor-parallel", "use --target trt-native or --target trt-plugin",
                             code="E-OPTION-TENSOR-PARALLEL")
    if options.quantize not in KEEP:
        raise UnsupportedModel("quantized weights are not cut over ranks", "--tensor-parallel, --quantize",
                               "leave out --quantize or --tensor-parallel", code="E-MODEL-QUANTIZED-RANKS")
    if options.hidden_states:
        raise GqaExportError("the graphs of several ranks give logits alone", "--hidden-states",
                             "leave out --hidden-states, or --tensor-parallel", code="E-OPTION-TENSOR-PARALLEL")
    if options.weights == "inplace":
        raise GqaExportError("the graphs of several ranks lie in folders of their own, which cannot point into the "
                             "folder above them", "--weights", "use --weights link: it writes no rows again either",
                             code="E-OPTION-TENSOR-PARALLEL")


def refuse_quantized_ranks(source: str, quantized: bool) -> None:
    """Refuse weights of codes: rows of them are cut nowhere yet.

    Raises:
        UnsupportedModel: the checkpoint's weights are quantized, and are to stay so.
    """
    if quantized:
        raise UnsupportedModel("quantized weights are not cut over ranks", source,
                               "use --quantize dequantize, or leave out --tensor-parallel",
                               code="E-MODEL-QUANTIZED-RANKS")


def lower_ranks(traced: Traced, options: LowerOptions, ranks: int, plan: dict[str, str],
                say: Callable[[str], None]) -> Ranks:
    """Cut a traced model and lower the graph of each rank.

    Args:
        traced: the whole.
        options: of the lowering.
        ranks: 2 or more.
        plan: transformers' own `base_model_tp_plan` of this model, {} where it has none.
        say: called with the name of each stage.

    Raises:
        UnsupportedModel: the model cannot be cut, or transformers' plan is another.
    """
    from ..lowering.lower import lower

    say(f"cutting over {ranks} ranks")
    sharded = shard(traced.model, traced.spec, options, ranks)
    refuse_disagreement(sharded.plan, plan)
    lowered = []
    for rank in range(ranks):
        one = lower(sharded.graph(rank), sharded.spec(rank), options,
                    partial(_stage, say, f"rank {rank}"))
        finish_collectives(one.model, ranks)
        lowered.append(one)
    order = collective_order(lowered[0].model)
    for rank, one in enumerate(lowered):
        if collective_order(one.model) != order:
            raise UnsupportedModel(f"the collectives of rank {rank} are not those of rank 0", rank_folder(rank),
                                   "this is a fault of gqa-export: please report the model", code="E-GRAPH-COLLECTIVES")
    return Ranks(sharded, tuple(lowered))


def _stage(say: Callable[[str], None], rank: str, stage: str) -> None:
    say(f"{rank}: {stage}")


def write_ranks(ranks: Ranks, store: WeightStore, writer: BundleWriter, options: ExportOptions, folder: Path,
                on_bytes: Callable[[int, int], None]) -> tuple[ParallelFacts, Placement]:
    """Place the weights of every rank, write its graph, and give the facts for the manifest and what was placed."""
    facts, copied, linked, files = list[RankFacts](), 0, 0, list[str]()
    plan = ranks.sharded.plan
    for number, lowered in enumerate(ranks.lowered):
        place_of = rank_folder(number)
        placed = place(lowered.model, store, writer, options.weights, folder, hash_full=options.hash_full,
                       on_bytes=on_bytes,
                       inside=f"{place_of}/")
        writer.write(f"{place_of}/{MODEL}", lowered.model.SerializeToString())
        heads = tuple(HeldHeads(layer.layer, number * layer.num_heads // plan.ranks, layer.num_heads // plan.ranks,
                                plan.heads[layer.layer][number]) for layer in plan.spec.layers)
        facts.append(RankFacts(place_of, heads, order_sha256(collective_order(lowered.model)), placed.bytes_copied,
                               placed.bytes_linked))
        copied, linked = copied + placed.bytes_copied, linked + placed.bytes_linked
        files += placed.files
    return ParallelFacts(tuple(facts), collective_order(ranks.lowered[0].model),
                         "gathered" if plan.vocabulary else "whole", dict(plan.whole)), \
        Placement(copied, linked, tuple(files))
