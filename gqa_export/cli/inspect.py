"""`gqa-export inspect`: the attention layers of a bundle or checkpoint, its states, what its KV cache costs, and how
its weights are quantized."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..bundle.engine_facts import FLAVORS
from ..targets import layers_label
from .tables import aligned, readable_bytes
from .trust_options import revision_option, trust_options

if TYPE_CHECKING:
    from ..bundle.engine_facts import EngineFacts
    from ..describe.inspection import Inspection, LayerGroup
    from ..exporting.rank_costs import RankCost
    from ..spec import AttentionSpec, KvCache, ModelSpec


@click.command(short_help="Show the attention layers and the KV-cache cost of a bundle or checkpoint.")
@click.argument("source", metavar="BUNDLE|CHECKPOINT")
@click.option("--tensor-parallel", type=click.IntRange(2), default=None, metavar="N",
              help="Also show what each of N devices would hold, for this model and for it as MQA and MHA.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@revision_option
@trust_options
def command(source: str, as_json: bool, tensor_parallel: int | None, revision: str | None, allow_pickle: bool) -> None:
    """Show each layer's attention and the bytes of the KV cache, against the same model as MHA and as MQA.

    For a checkpoint, the model is called once and each layer's arguments of attention are recorded.
    """
    from .. import api
    from .progress import progress

    with progress(f"inspecting {Path(source).name}"):
        found = api.inspect(source, revision=revision, allow_pickle=allow_pickle)
        ranks = api.rank_costs(source, tensor_parallel, revision=revision, allow_pickle=allow_pickle) \
            if tensor_parallel else ()
    if as_json:
        more = {"tensor_parallel": [asdict(cost) for cost in ranks]} if ranks else {}
        click.echo(json.dumps({**found.to_dict(), **more}, indent=1))
        return
    click.echo("\n".join([*describe(found), *(rank_table(ranks, found) if ranks else [])]))


def describe(found: Inspection) -> list[str]:
    """The whole answer as lines of text."""
    spec = found.spec
    lines = [
        f"{found.kind} {found.source}",
        f"  {spec.architecture} ({spec.model_type}), {len(spec.layers)} attention layers, hidden size "
        f"{spec.hidden_size}, vocabulary {spec.vocabulary}",
        f"  positions {spec.max_positions}, rotary {spec.rope or 'none'}",
        f"  {size_words(found)}",
    ]
    if found.groups:
        lines += ["", "attention", *attention_table(found.groups), *sharing_lines(spec)]
    if spec.states:
        lines += ["", f"states of one sequence, fp32: {readable_bytes(spec.state_bytes)}, constant in its length",
                  *state_table(spec)]
    if found.groups:
        lines += ["", f"KV cache of one sequence, {_cache_type(found)}", *cache_table(found)]
    if found.manifest is not None:
        lines += ["", *bundle_lines(found)]
    if found.matrices:
        from ..describe.stored_matrices import stored_lines

        lines += ["", *stored_lines(found.matrices)]
    return lines


def _cache_type(found: Inspection) -> str:
    """What a cache holds: numbers of a format, or codes."""
    kv = found.manifest.kv_cache if found.manifest else None
    return f"{kv.kind} codes" if kv else found.element_dtype


def size_words(found: Inspection) -> str:
    """Parameters and bytes of weights; of an engine its own bytes."""
    if found.parameters is None or found.weight_bytes is None:
        return f"{readable_bytes(found.engine_bytes or 0)} of TensorRT engine, in which parameters cannot be counted"
    return f"{found.parameters:,} parameters, {readable_bytes(found.weight_bytes)} of weights"


def attention_table(groups: tuple[LayerGroup, ...]) -> list[str]:
    """One row for each group of equal layers."""
    from ..describe.inspection import kind_of_attention

    header = ("layers", "kind", "heads", "kv heads", "head size", "window", "softcap", "sinks", "scale")
    rows = []
    for group in groups:
        a = group.attention
        size = str(a.head_size) if a.head_size == a.value_head_size else f"{a.head_size}/{a.value_head_size}"
        rows.append((numbers(group.layers), kind_of_attention(a),
                     str(a.num_heads), str(a.kv_num_heads), size, sight(a),
                     f"{a.softcap:g}" if a.softcap else "none", "yes" if a.sinks else "no", f"{a.scale:.6g}"))
    return aligned(header, rows, left=2)


def sharing_lines(spec: ModelSpec) -> list[str]:
    """Which layers keep no keys and values, and whose they read."""
    return [f"  {layers_label(layer.layer for layer in readers[1:])} read{'s' if len(readers) == 2 else ''} the cache "
            f"of layer {owner}" for owner, readers in spec.reading().items() if len(readers) > 1]


def sight(layer: AttentionSpec) -> str:
    """What a token sees of those before it, in a word."""
    return f"chunks of {layer.chunk}" if layer.chunk else str(layer.window or "all")


def state_table(spec: ModelSpec) -> list[str]:
    """One row for each group of layers that keep the same state."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for state in spec.states:
        sizes = ", ".join(f"{axis} {size}" for size, axis in zip(state.shape, state.axes))
        groups.setdefault((state.name, state.kernel, sizes, readable_bytes(state.bytes)), []).append(state.layer)
    rows = [(numbers(tuple(layers)), *facts) for facts, layers in groups.items()]
    return aligned(("layers", "state", "kernel", "shape", "bytes"), rows, left=4)


def numbers(layers: tuple[int, ...]) -> str:
    """(0, 1, 2, 4) -> "0-2, 4"; (0, 2, 4) -> "0-4 by 2"."""
    steps = {after - before for before, after in pairwise(layers)}
    if len(layers) > 2 and len(steps) == 1 and steps != {1}:
        return f"{layers[0]}-{layers[-1]} by {steps.pop()}"
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def cache_table(found: Inspection) -> list[str]:
    """One row for each context length."""
    rows = [(f"{cost.tokens:,}", readable_bytes(cost.bytes), readable_bytes(cost.mha_bytes),
             readable_bytes(cost.mqa_bytes), f"{cost.mha_bytes / cost.bytes:.2f}x") for cost in found.costs]
    return aligned(("tokens", "this model", "as MHA", "as MQA", "saved against MHA"), rows)


def rank_table(ranks: tuple[RankCost, ...], found: Inspection) -> list[str]:
    """What one of several devices holds."""
    tokens = found.costs[-1].tokens
    rows = [(cost.kind, str(cost.kv_heads), readable_bytes(cost.cache_bytes_per_token * tokens),
             f"{cost.whole_cache_bytes_per_token / cost.cache_bytes_per_token:.2f}x",
             readable_bytes(cost.weight_bytes), f"{cost.whole_weight_bytes / cost.weight_bytes:.2f}x")
            for cost in ranks]
    return ["", f"each of {ranks[0].ranks} devices, one sequence of {tokens:,} tokens", *aligned(
        ("", "kv heads", "cache", "less than whole", "weights", "less than whole"), rows)]


def window_lines(found: Inspection) -> list[str]:
    """What each kind of windowed layer keeps in place of the whole capacity."""
    manifest = found.manifest
    assert manifest is not None
    assert manifest.window_cache is not None
    windows, lines = manifest.window_cache, []
    for group in found.groups:
        slots = windows.slots(group.attention)
        if slots:
            rings = tuple(layer for layer in group.layers if layer in windows.layers)
            lines.append(f"window cache: layers {numbers(rings)} keep {slots} tokens of {manifest.capacity}: a "
                         f"window of {group.attention.window} and a prompt chunk of {windows.chunk}")
    return lines


def _codes_line(kv: KvCache) -> str:
    """Where the scales of a quantized cache come from, and the most that one clips."""
    most = [max(((getattr(each, f"{kind}_clip"), each.layer) for each in kv.scales), default=(0.0, 0))
            for kind in ("key", "value")]
    cut = " and ".join(f"{share:.3%} of the {kind}s (layer {layer})" for kind, (share, layer)
                       in zip(("key", "value"), most))
    return f"cache of {kv.kind} codes, scales chosen from {kv.tokens} tokens of a text; of it they clip at most {cut}"


def engine_lines(engine: EngineFacts) -> list[str]:
    """What built an engine, for which GPUs, with which attention, and the shapes that it takes."""
    gpus = ", ".join(f"{number // 10}.{number % 10}" for number in engine.compute_capabilities)
    lines = [f"engine {engine.file}: {FLAVORS.get(engine.flavor, engine.flavor)} {engine.version}, "
             + (f"compute capability {gpus}" if gpus else "for the GPU that it was built on")
             + f", {engine.attention} attention" + (", weights not inside" if engine.stripped else "")]
    for profile in engine.profiles:
        shapes = profile.shapes.get("input_ids")
        if shapes is not None and all(len(shape) == 2 for shape in shapes):
            least, best, most = (f"{batch} x {tokens}" for batch, tokens in shapes)
            lines.append(f"  profile {profile.name}: sequences x new tokens from {least} to {most}, chosen for {best}")
    return lines


def bundle_lines(found: Inspection) -> list[str]:
    """Target, inputs and outputs, fallbacks, versions."""
    manifest = found.manifest
    assert manifest is not None
    lines = [f"target {manifest.target}, dtype {manifest.dtype}, cache {manifest.cache}, capacity {manifest.capacity}, "
             f"logits {manifest.logits}, weights {manifest.weights}"]
    if manifest.window_cache is not None:
        lines += window_lines(found)
    if manifest.kv_cache is not None:
        lines.append(_codes_line(manifest.kv_cache))
    for title, facts in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        shown = facts if len(facts) <= 6 else facts[:4] + facts[-2:]
        rows = [(fact.name, fact.dtype, "[" + ", ".join(map(str, fact.shape)) + "]") for fact in shown]
        more = f" (first 4 and last 2 of {len(facts)})" if len(facts) > 6 else ""
        lines += [f"{title}{more}", *aligned(("name", "dtype", "shape"), rows, left=3)]
    for fallback in manifest.fallbacks:
        who = "the model" if fallback.layer < 0 else f"layer {fallback.layer}"
        lines.append(f"fallback: {who}: {fallback.used} instead of {fallback.wanted}: {fallback.reason}")
    if not manifest.fallbacks:
        lines.append("fallbacks: none")
    if manifest.engine is not None:
        lines += engine_lines(manifest.engine)
    if manifest.quantization is not None:
        graph = ["in the graph that the engine was built from:"] if manifest.engine is not None else []
        lines += [*graph, *manifest.quantization.lines()]
    if manifest.verdict is not None:
        lines.append(f"verdict recorded: {manifest.verdict}")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return [*lines, f"made with {versions}"] if versions else lines
