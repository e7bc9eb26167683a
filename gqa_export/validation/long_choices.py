"""What a model's layers choose among, and whether another choice was a near tie.

Method hyper compares products with zero, method tiles compares the masses of blocks. Dimensions as in
`gqa_export.long_attention_op`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from gqa_plugins.grouped_attention import long_selection

from ..long_attention_op import LongSetting
from ..long_context.attention import Replacement, tables
from ..spec import AttentionSpec


@dataclass
class Choices:
    """The quantities that every approximated layer of a run compares, by layer and call.

    products: of keys [K, T, r] and queries [K, G, S, r] with the projections. masses: by leaf and tile, [K, blocks].
    """

    replacement: Replacement
    products: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    masses: dict[int, list[dict[tuple[int, int], torch.Tensor]]] = field(default_factory=dict)

    def watched(self) -> Replacement:
        """The replacement, with this looking on."""
        return replace(self.replacement, watch=self.look, reached=set(), seconds={})

    def look(self, spec: AttentionSpec, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
             sinks: torch.Tensor | None) -> None:
        """Keep what a layer compares."""
        if spec.layer not in self.replacement.layers:
            return
        setting = self.replacement.setting
        own, scores = long_selection.Setting(**setting.attributes()), long_selection.Scores(spec.scale, spec.softcap)
        known = tables(spec, setting, self.replacement.seed)
        for past, new in self.replacement.chunks:
            mine, keys = query[:, :, past: past + new], key[:, : past + new]
            directions = known.projections.to(key.dtype)
            if own.method == long_selection.HYPER:
                self.products.setdefault(spec.layer, []).append((keys @ directions, mine @ directions))
                continue
            found = {}
            for leaf in long_selection.leaves(past, new, setting.leaf):
                for tile in range(setting.leaf // setting.tile if leaf.number else 0):
                    rows, voters = long_selection.voting_rows(leaf, tile, own)
                    if rows:
                        found[leaf.number, tile] = long_selection.block_masses(
                            mine[:, :, leaf.step + voters], keys[:, : leaf.number * setting.leaf], own, scores)
            self.masses.setdefault(spec.layer, []).append(found)


@dataclass
class Agreement:
    """How many choices were compared and are the same; how far from a tie the first is that is beyond a near tie (0:
    none is), the bound there, and where."""

    compared: int = 0
    agreed: int = 0
    excess: float = 0.0
    bound: float = 0.0
    where: str = ""

    def note(self, apart: torch.Tensor, bound: float, where: str) -> None:
        """Choices that differ, with how far each was from a tie."""
        worst = float(apart.max()) if apart.numel() else 0.0
        if worst > bound and not self.where:  # the first layer's; later ones follow from it
            self.excess, self.bound, self.where = worst, bound, where


def agreement(reference: Choices, baseline: Choices | None, handed: dict[int, list[long_selection.Selection]],
              setting: LongSetting, factor: float, floor: float) -> Agreement:
    """Hold the choices of a graph against those of the reference.

    Args:
        reference, baseline: what PyTorch compared in fp64, and in the number format that was run; None: unknown.
        handed: what the graph chose, by layer and call.
        setting: of the op.
        factor: how many times PyTorch's own error a near tie may be apart. floor: the same, as a part of the largest
            value, where PyTorch happens to be nearly exact.
    """
    found = Agreement()
    for layer, calls in handed.items():
        for call, selection in enumerate(calls):
            where = f"layer {layer}, call {call}"
            if selection.key_places is not None and selection.query_places is not None:
                exact = reference.products[layer][call]
                close = baseline.products[layer][call] if baseline else (None, None)
                for places, products, rounded in zip((selection.key_places, selection.query_places), exact, close):
                    _products(found, places, products, rounded, factor, floor, where)
            elif selection.tiles is not None:
                rounded_masses = baseline.masses[layer][call] if baseline else {}
                for tile, masses in reference.masses[layer][call].items():
                    _blocks(found, selection.tiles[tile], masses, rounded_masses.get(tile), setting, factor, floor,
                            f"{where}, leaf {tile[0]}, tile {tile[1]}")
    return found


def _bound(exact: torch.Tensor, rounded: torch.Tensor | None, factor: float, floor: float) -> float:
    moved = 0.0 if rounded is None else float((exact - rounded.double()).abs().max())
    return max(factor * moved, floor * float(exact.abs().max()))


def _products(found: Agreement, places: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor | None, factor: float,
              floor: float, where: str) -> None:
    """Bits of codes: a bit may be another where its product is near zero."""
    bits = exact.shape[-1]
    code = places ^ places >> 1  # the place in the order of the Gray code -> the code
    got = (code[..., None] >> torch.arange(bits)) & 1
    other = got != (exact > 0)
    found.compared += other.numel()
    found.agreed += int((~other).sum())
    found.note(exact.abs()[other], _bound(exact, rounded, factor, floor), where)


def _blocks(found: Agreement, got: torch.Tensor, masses: torch.Tensor, rounded: torch.Tensor | None,
            setting: LongSetting, factor: float, floor: float, where: str) -> None:
    """Blocks of a tile: one may be another's if their masses are nearly the same; those with anchors must be there."""
    own = long_selection.Setting(**setting.attributes())
    wanted = long_selection.chosen_blocks(masses, own)
    bound = _bound(masses, rounded, factor, floor)
    for head, (ours, theirs) in enumerate(zip(got.tolist(), wanted.tolist())):
        mine, right = set(ours) - {-1}, set(theirs) - {-1}
        found.compared += len(right)
        found.agreed += len(mine & right)
        lost, more = right - mine, mine - right
        forced = any(block * setting.block < setting.anchors for block in lost)
        unknown = any(not 0 <= block < masses.shape[1] for block in mine)
        if forced or unknown or len(mine) != len(right):
            found.note(torch.tensor([torch.inf]), bound, f"{where}: blocks {sorted(mine)[:8]}")
        elif lost:
            apart = masses[head, list(lost)].max() - masses[head, list(more)].min()
            found.note(apart[None], bound, where)
