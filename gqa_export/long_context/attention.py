"""Any causal language model of transformers with its attention, layer by layer, exact or as the op for long prompts.

One sequence from position 0, no cache. What a layer computes (scale, soft cap, window, sinks) comes from its spec,
which the probe has held against the model's masks; the masks themselves are not built. Dimensions as in
`gqa_export.long_attention_op`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from gqa_plugins.grouped_attention import long_reference, long_selection

from .. import long_attention_op
from ..errors import UnsupportedModel
from ..long_attention_op import LongSetting
from ..spec import AttentionSpec, ModelSpec

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

NAME = "gqa_long_context"
ROWS = 512
"""rows of exact attention that are computed at once"""

Watch = Callable[[AttentionSpec, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""called in an exact layer with its spec, query [K, G, S, D], key [K, S, D], value [K, S, E] and sinks"""


@dataclass
class Replacement:
    """Which layers are approximated while a model runs, and what was reached.

    Attributes:
        spec: of the model.
        setting: how. seed: of the tables.
        layers: numbers of the layers that are approximated.
        watch: see `Watch`.
        handed: what each layer selects, by layer and chunk, in place of its own choice.
        chunks: (past, new) of the calls in which the sequence is fed; () is one call. What rows select depends on it.
        reached: layers that called attention.
        seconds: of attention, by layer.
    """

    spec: ModelSpec
    setting: LongSetting
    seed: int = 0
    layers: frozenset[int] = frozenset()
    watch: Watch | None = None
    handed: dict[int, list[long_selection.Selection]] = field(default_factory=dict)
    chunks: tuple[tuple[int, int], ...] = ()
    reached: set[int] = field(default_factory=set)
    seconds: dict[int, float] = field(default_factory=dict)


_CURRENT: list[Replacement] = []


@contextmanager
def replaced(replacement: Replacement) -> Iterator[Replacement]:
    """The models that `load` gave run by this replacement, inside."""
    _CURRENT.append(replacement)
    try:
        yield replacement
    finally:
        _CURRENT.pop()


def load(checkpoint: Checkpoint, dtype: str = "float32") -> Any:
    """A model that runs inside of `replaced`."""
    from ..checkpoint.load_model import load_model

    register()
    return load_model(checkpoint, dtype, attn_implementation=NAME)


def register() -> None:
    """Make `NAME` an attention implementation of transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def refuse_unreached(replacement: Replacement, source: str) -> None:
    """Refuse a model whose attention this module never saw.

    Raises:
        UnsupportedModel: names the layers.
    """
    missing = sorted({layer.layer for layer in replacement.spec.layers} - replacement.reached)
    if missing:
        raise UnsupportedModel("the attention of some layers does not go through transformers' attention interface, so "
                               "that it cannot be replaced for a measurement", f"{source}: layers {missing}",
                               "export with --long-layers and measure the bundle itself", code="E-MODEL-LONG")


def tables(spec: AttentionSpec, setting: LongSetting, seed: int) -> long_selection.Tables:
    """The tables of a layer."""
    return long_selection.Tables(
        torch.tensor(long_attention_op.fractions(seed, spec.layer, spec.kv_num_heads, setting.samples)),
        torch.tensor(long_attention_op.projections(seed, spec.layer, spec.head_size)),
        torch.tensor(long_attention_op.code_order()))


def approximate(spec: AttentionSpec, setting: LongSetting, seed: int, query: torch.Tensor, key: torch.Tensor,
                value: torch.Tensor, sinks: torch.Tensor | None, handed: list[long_selection.Selection] | None = None,
                chunks: tuple[tuple[int, int], ...] = ()) -> torch.Tensor:
    """A layer's output [K, G, S, E] by the op. handed, chunks: see `Replacement`."""
    own, scores = long_selection.Setting(**setting.attributes()), long_selection.Scores(spec.scale, spec.softcap)
    known = tables(spec, setting, seed)
    sink = sinks.to(query.dtype) if sinks is not None else query.new_full((spec.num_heads,), -torch.inf)
    sink = sink.reshape(spec.kv_num_heads, -1, 1, 1)
    rows = (long_reference.rows_of_hyper if own.method == long_selection.HYPER else long_reference.rows_of_tiles)
    parts = []
    for number, (past, new) in enumerate(chunks or ((0, query.shape[2]),)):
        mine, keys = query[:, :, past: past + new], key[:, : past + new]
        if (handed[number].empty if handed else new <= setting.exact_steps):
            whole = long_selection.Leaf(0, past, past + new, 0)  # one leaf from position 0 on is every key
            parts.append(long_reference.own_leaf(mine, keys, value[:, : past + new], whole, own, scores).mean(sink))
            continue
        chosen = handed[number] if handed else long_selection.select(mine, keys, past, new, own, scores, known)
        parts += [rows(mine[:, :, leaf.step: leaf.step + leaf.rows], keys, value[:, : past + new], leaf, own, scores,
                       known, chosen).mean(sink) for leaf in long_selection.leaves(past, new, setting.leaf)]
    return torch.cat(parts, 2)


def exact(spec: AttentionSpec, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
          sinks: torch.Tensor | None) -> torch.Tensor:
    """A layer's output [K, G, S, E], every key that it sees read."""
    if not spec.softcap and sinks is None and not spec.edges:
        keys, values = (x[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=spec.scale)
    return torch.cat([torch.softmax(weights, -1)[..., :-1] @ value[:, None, : weights.shape[-1] - 1]
                      for weights in exact_scores(spec, query, key, sinks)], 2)


def exact_scores(spec: AttentionSpec, query: torch.Tensor, key: torch.Tensor,
                 sinks: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Masked scores of `ROWS` rows at a time, [K, G, rows, keys up to the last + 1]; the last column is the sink."""
    scores = long_selection.Scores(spec.scale, spec.softcap)
    for start in range(0, query.shape[2], ROWS):
        rows = query[:, :, start: start + ROWS]
        end = start + rows.shape[2]
        found = scores.of(rows, key[:, None, :end])
        queries, keys = torch.arange(start, end)[:, None], torch.arange(end)
        hidden = keys > queries
        if spec.window:
            hidden |= queries - keys >= spec.window
        if spec.chunk:
            hidden |= keys // spec.chunk < queries // spec.chunk
        sink = sinks.to(query.dtype) if sinks is not None else query.new_full((spec.num_heads,), -torch.inf)
        column = sink.reshape(spec.kv_num_heads, -1, 1, 1).expand(*found.shape[:3], 1)
        yield torch.cat((found.masked_fill(hidden, -torch.inf), column), -1)


def _attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
               **arguments: Any) -> tuple[torch.Tensor, None]:
    """What transformers calls: query [1, H, S, D], key and value [1, K, S, D or E]."""
    current = _CURRENT[-1]
    spec = next(layer for layer in current.spec.layers if layer.layer == module.layer_idx)
    current.reached.add(spec.layer)
    sinks = arguments.get("s_aux")
    q = query[0].unflatten(0, (spec.kv_num_heads, -1))
    started = time.perf_counter()
    if spec.layer in current.layers:
        output = approximate(spec, current.setting, current.seed, q, key[0], value[0], sinks,
                             current.handed.get(spec.layer), current.chunks)
    else:
        output = exact(spec, q, key[0], value[0], sinks)
    current.seconds[spec.layer] = time.perf_counter() - started
    if current.watch is not None:
        current.watch(spec, q, key[0], value[0], sinks)
    return output.flatten(0, 1).transpose(0, 1)[None].contiguous(), None
