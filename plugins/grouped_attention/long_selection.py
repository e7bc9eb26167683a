"""What `gqa::LongGroupedQueryAttention` reads of a prompt: buckets of codes (hyper), blocks (tiles), samples.

Dimensions as in `gqa_export.long_attention_op`. Everything is exact integers but the codes (signs of products) and the
ranking of blocks (sums of softmax weights): only there can two runtimes disagree, and only where it is a near tie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gqa_export.long_attention_op import STEPS

HYPER, TILES = 1, 2


@dataclass(frozen=True)
class Setting:
    """The op's own attributes."""

    method: int
    leaf: int
    heavy_keys: int
    samples: int
    anchors: int
    tile: int
    block: int
    score_rows: int
    exact_steps: int

    @property
    def blocks(self) -> int:
        """Chosen blocks of a tile."""
        return self.heavy_keys // self.block


@dataclass(frozen=True)
class Tables:
    """What takes the place of random numbers: fractions [K, m], projections [D, r], code_order [2^r]."""

    fractions: Tensor
    projections: Tensor
    code_order: Tensor


@dataclass(frozen=True)
class Scores:
    """How a score is made."""

    scale: float
    softcap: float

    def of(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores [.., rows, keys]."""
        scores = query @ key.transpose(-1, -2) * self.scale
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores


@dataclass(frozen=True)
class Leaf:
    """The rows of one leaf of one sequence that a call brings: positions first .. last - 1, steps from `step`."""

    number: int
    first: int
    last: int
    step: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.last - self.first


def codes(x: Tensor, tables: Tables) -> Tensor:
    """Place of the code of every vector [.., D] in the order of codes, [..]."""
    bits = (x @ tables.projections.to(x.dtype)) > 0
    powers = 2 ** torch.arange(bits.shape[-1])
    return tables.code_order[(bits * powers).sum(-1)]


def sample_indices(tables: Tables, keys: int) -> tuple[Tensor, float]:
    """Sampled keys of a span of `keys`, [K, min(m, keys)], one of each stratum, and the logarithm of their weight."""
    count = min(tables.fractions.shape[1], keys)
    strata = torch.arange(count) * STEPS + tables.fractions[:, :count]
    return strata * keys // (count * STEPS), math.log(keys / count)


def leaves(past: int, new: int, leaf: int) -> Iterator[Leaf]:
    """The leaves to which new positions belong."""
    for number in range(past // leaf, -(-(past + new) // leaf) if new else 0):
        first, last = max(past, number * leaf), min(past + new, (number + 1) * leaf)
        yield Leaf(number, first, last, first - past)


def voting_rows(leaf: Leaf, tile: int, setting: Setting) -> tuple[range, Tensor]:
    """The rows of a tile of a leaf that this call brings, as offsets into the leaf's rows, and those that vote."""
    start = leaf.number * setting.leaf + tile * setting.tile
    low, high = max(leaf.first, start), min(leaf.last, start + setting.tile)
    rows = range(low - leaf.first, max(high, low) - leaf.first)
    picked = torch.arange(1, setting.score_rows + 1) * len(rows) // setting.score_rows - 1
    return rows, rows.start + picked.clamp(min=0)


def block_masses(query: Tensor, keys: Tensor, setting: Setting, scores: Scores) -> Tensor:
    """What the voting rows [K, G, g, D] put on each block of a prefix [K, w, D]: [K, blocks]."""
    weights = torch.softmax(scores.of(query, keys[:, None]), -1)
    return weights.unflatten(-1, (-1, setting.block)).sum((1, 2, 4))


def chosen_blocks(masses: Tensor, setting: Setting) -> Tensor:
    """Blocks of most mass, those with anchors first; [K, min(blocks of the setting, blocks)], -1 where none is left."""
    forced = -(-setting.anchors // setting.block)
    ranked = masses.clone()
    ranked[:, :forced] = torch.inf
    count = min(setting.blocks, masses.shape[1])
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[:, :count]
    return torch.nn.functional.pad(order, (0, setting.blocks - count), value=-1)


def buckets(leaf: Leaf, rank: Tensor, width: int, setting: Setting) -> tuple[Tensor, int]:
    """The bucket of every row, by its rank in its leaf, in a segment of `width` keys, and the keys of a bucket."""
    count = max(1, width // setting.heavy_keys)
    return rank * count // leaf.rows, width // count


def ranks(places: Tensor) -> tuple[Tensor, Tensor]:
    """Order and rank along the last axis; equal places by index."""
    order = torch.sort(places, dim=-1, stable=True).indices
    rank = torch.empty_like(order)
    return order, rank.scatter_(-1, order, torch.arange(order.shape[-1]).expand_as(order).contiguous())


@dataclass
class Selection:
    """What one sequence's rows select: for hyper the places of all codes, for tiles the blocks of every tile.

    key_places: [K, T]; query_places: [K, G, S]; tiles: (leaf, tile) -> [K, blocks].
    """

    key_places: Tensor | None = None
    query_places: Tensor | None = None
    tiles: dict[tuple[int, int], Tensor] | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing was selected: the call was exact."""
        return self.key_places is None and self.tiles is None


def select(query: Tensor, key: Tensor, past: int, new: int, setting: Setting, scores: Scores,
           tables: Tables) -> Selection:
    """What the rows of a sequence select, from its queries [K, G, S, D] and keys [K, T, D]."""
    if setting.method == HYPER:
        return Selection(codes(key, tables), codes(query, tables))
    tiles = {}
    for leaf in leaves(past, new, setting.leaf):
        for tile in range(setting.leaf // setting.tile if leaf.number else 0):
            rows, voters = voting_rows(leaf, tile, setting)
            if rows:
                masses = block_masses(query[:, :, leaf.step + voters], key[:, : leaf.number * setting.leaf], setting,
                                      scores)
                tiles[leaf.number, tile] = chosen_blocks(masses, setting)
    return Selection(tiles=tiles)


def packed(selection: Selection, past: int, new: int, setting: Setting, heads: int) -> Tensor:
    """A selection as the op gives it, [K, N]."""
    if setting.method == HYPER:
        assert selection.key_places is not None
        assert selection.query_places is not None
        return torch.cat((selection.key_places, selection.query_places.flatten(1)), 1)
    assert selection.tiles is not None
    none = torch.full((heads, setting.blocks), -1)
    parts = [selection.tiles.get((leaf.number, tile), none) for leaf in leaves(past, new, setting.leaf)
             for tile in range(setting.leaf // setting.tile)]
    return torch.cat(parts, 1) if parts else none[:, :0]


def unpacked(handed: Tensor, past: int, new: int, steps: int, keys: int, group: int, setting: Setting) -> Selection:
    """The inverse of `packed`."""
    if setting.method == HYPER:
        return Selection(handed[:, :keys], handed[:, keys:].unflatten(1, (group, steps)))
    tiles, at = {}, 0
    for leaf in leaves(past, new, setting.leaf):
        for tile in range(setting.leaf // setting.tile):
            tiles[leaf.number, tile] = handed[:, at: at + setting.blocks]
            at += setting.blocks
    return Selection(tiles=tiles)
