"""Several key/value heads -> one: mean, first, random, and the best fit of low rank. All in fp64, by Gram matrices.

A pooled layer has, for each new head, one key matrix W [D, in + 1] and one value matrix, and for each source head i a
map with W_i ~ A_i W. Maps go into the query rows (q' = A_i^T q) and the output columns (o' = o B_i), so that they cost
nothing. Key maps must commute with rotary embedding: per pair of features a complex number (a rotation and a scale);
features that rotary leaves alone may be mixed at will. Source of mean, first, random: Ainslie et al., 2023
(arXiv:2305.13245), figure 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .heads import LayerHeads
from .layout import LayerLayout

Groups = tuple[tuple[int, ...], ...]
METHODS = ("mean", "first", "random", "svd", "calibrated")
SMALL = 1e-30


@dataclass(frozen=True)
class Metric:
    """What a row's error is measured by: row L, with L L^T the second moments of a layer's input [in + 1, in + 1].

    None: the rows themselves. query_moments [N, D]: mean square of each query feature, summed over the queries of a
    source head. output_roots [N, E, E]: R with R^T R the sum of O_h^T O_h over the same queries.
    """

    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    query_moments: torch.Tensor | None = None
    output_roots: torch.Tensor | None = None


@dataclass(frozen=True)
class Pooled:
    """One layer, pooled. key [K, D, in + 1], value [K, E, in + 1]; maps by source head, None where all are identity.

    groups[g]: the source heads of new head g, in the new order. output: the whole [out, H * E] by new query order
    where it was fitted, else None.
    """

    groups: Groups
    key: torch.Tensor
    value: torch.Tensor
    key_maps: torch.Tensor | None = None
    value_maps: torch.Tensor | None = None
    output: torch.Tensor | None = None

    @property
    def order(self) -> tuple[int, ...]:
        """Source heads in their new order."""
        return tuple(head for group in self.groups for head in group)

    @property
    def in_place(self) -> bool:
        """Whether queries and output stay as they are."""
        plain = self.key_maps is None and self.value_maps is None and self.output is None
        return plain and self.order == tuple(range(len(self.order)))


def contiguous(count: int, kv_heads: int) -> Groups:
    """(0, 1, ...), (...), ...: neighbours pooled, as in the paper."""
    size = count // kv_heads
    return tuple(tuple(range(start, start + size)) for start in range(0, count, size))


def mappable(layout: LayerLayout) -> tuple[bool, bool]:
    """Whether key maps can go into the queries, and value maps into the output projection."""
    return {"key", "query"} <= layout.linear, "value" in layout.linear and layout.output is not None


def pool(heads: LayerHeads, groups: Groups, method: str, *, align: bool = False, metric: Metric | None = None,
         seed: int = 0, spread: float = 0.02) -> Pooled:
    """Pool one layer. align: heads are turned towards each other before their mean (by what queries and output can
    take up). spread: standard deviation of `random`. `calibrated` is the fit of `svd` under a `metric`."""
    if method == "random":
        return _random(heads, groups, seed, spread)
    if method == "first":
        return Pooled(groups, torch.stack([heads.key(group[0]) for group in groups]),
                      torch.stack([heads.value(group[0]) for group in groups]))
    metric = metric or Metric()
    fit, plain = method != "mean", method == "mean" and not align
    keys, values, key_maps, value_maps = [], [], {}, {}
    for group in groups:
        key, maps = _keys(heads, group, metric, fit, plain)
        keys.append(key)
        key_maps.update(maps)
        value, maps = _values(heads, group, metric, fit, plain)
        values.append(value)
        value_maps.update(maps)
    return Pooled(groups, torch.stack(keys), torch.stack(values), _stack(key_maps), _stack(value_maps))


def _stack(maps: dict[int, torch.Tensor]) -> torch.Tensor | None:
    """Maps by source head; None if every one is the identity."""
    if not maps or all(torch.equal(each, torch.eye(len(each), dtype=each.dtype)) for each in maps.values()):
        return None
    return torch.stack([maps[head] for head in sorted(maps)])


def _random(heads: LayerHeads, groups: Groups, seed: int, spread: float) -> Pooled:
    made = []
    for role, rows in ((1, heads.key(0)), (2, heads.value(0))):
        generator = torch.Generator().manual_seed((seed * 1009 + heads.layout.layer) * 2 + role)
        new = spread * torch.randn(len(groups), *rows.shape, generator=generator, dtype=torch.float64)
        new[..., -1] = 0
        made.append(new)
    return Pooled(groups, *made)


def _mean(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(rows)).mean(0)


def _same(rows: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(rows[0], other) for other in rows[1:])


def _keys(heads: LayerHeads, group: Sequence[int], metric: Metric, fit: bool,
          plain: bool) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    rows = [heads.key(head) for head in group]
    size = heads.layout.key.size
    identity = {head: torch.eye(size, dtype=torch.float64) for head in group}
    if plain or _same(rows) or not mappable(heads.layout)[0]:
        return _mean(rows), identity
    stack = torch.stack(rows)
    pooled, maps = torch.zeros_like(rows[0]), torch.zeros(len(group), size, size, dtype=torch.float64)
    moments = None if metric.query_moments is None else metric.query_moments[list(group)]
    if heads.layout.pairs:
        first, second = (torch.tensor(side) for side in zip(*heads.layout.pairs, strict=True))
        turned = torch.complex(stack[:, first], stack[:, second])
        scales = None if moments is None else (moments[:, first] + moments[:, second]).sqrt()
        mean, factors = pool_pairs(turned, metric.key, scales, fit)
        pooled[first], pooled[second] = mean.real, mean.imag
        maps[:, first, first], maps[:, second, second] = factors.real, factors.real
        maps[:, second, first], maps[:, first, second] = factors.imag, -factors.imag
    if heads.layout.free:
        free = torch.tensor(heads.layout.free)
        roots = None if moments is None else torch.diag_embed(moments[:, free].sqrt())
        mean, mixed = pool_free(stack[:, free], metric.key, roots, fit)
        pooled[free] = mean
        maps[:, free[:, None], free[None, :]] = mixed
    return pooled, dict(zip(group, maps, strict=True))


def _values(heads: LayerHeads, group: Sequence[int], metric: Metric, fit: bool,
            plain: bool) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    rows = [heads.value(head) for head in group]
    if plain or _same(rows) or not mappable(heads.layout)[1]:
        return _mean(rows), {head: torch.eye(heads.layout.value.size, dtype=torch.float64) for head in group}
    roots = None if metric.output_roots is None else metric.output_roots[list(group)]
    pooled, maps = pool_free(torch.stack(rows), metric.value, roots, fit)
    return pooled, dict(zip(group, maps, strict=True))


def measured(rows: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """Rows [..., in + 1] as the metric sees them."""
    return rows if metric is None else rows @ metric.to(rows.dtype)


def pool_pairs(rows_nPI: torch.Tensor, metric: torch.Tensor | None, scales_nP: torch.Tensor | None,
               fit: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Complex rows of n heads -> one row per pair [P, I] and factors [n, P] with rows[i] ~ factors[i] * row.

    fit: the best of rank one, heads weighted by `scales`; else the mean after each was turned (factors of modulus one).
    """
    seen = measured(rows_nPI, metric)
    gram = torch.einsum("npi,mpi->pnm", seen, seen.conj())
    if fit:
        scale = torch.ones(rows_nPI.shape[:2], dtype=torch.float64) if scales_nP is None else scales_nP
        scale = (scale / scale.amax(0, keepdim=True).clamp_min(SMALL)).clamp_min(1e-6).T  # [P, n]
        top = torch.linalg.eigh(scale[:, :, None] * gram * scale[:, None, :]).eigenvectors[..., -1]
        return torch.einsum("pn,npi->pi", top.conj() * scale, rows_nPI), (top / scale).T
    factors = torch.ones(rows_nPI.shape[:2], dtype=rows_nPI.dtype)  # turn each towards the sum of all
    for _ in range(50):
        towards = torch.einsum("pnm,mp->np", gram, factors)
        factors = torch.where(towards.abs() > SMALL, towards / towards.abs().clamp_min(SMALL), factors)
    return torch.einsum("np,npi->pi", factors.conj(), rows_nPI) / len(rows_nPI), factors


def pool_free(rows_nDI: torch.Tensor, metric: torch.Tensor | None, roots_nDD: torch.Tensor | None,
              fit: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of n heads -> one head [D, I] and maps [n, D, D] with rows[i] ~ maps[i] @ head.

    fit: the best of rank D, the error of head i measured after `roots[i]`; else the mean of the heads, each first
    turned by an orthogonal map (Procrustes).
    """
    count, size, _ = rows_nDI.shape
    if fit:
        scaled = rows_nDI if roots_nDD is None else roots_nDD @ rows_nDI
        seen = measured(scaled, metric).reshape(count * size, -1)
        top = torch.linalg.eigh(seen @ seen.T).eigenvectors[:, -size:].reshape(count, size, size)
        maps = top if roots_nDD is None else torch.linalg.pinv(roots_nDD, rtol=1e-6) @ top
        return torch.einsum("nde,ndi->ei", top, scaled), maps
    seen = measured(rows_nDI, metric)
    gram = torch.einsum("ndi,mei->ndme", seen, seen)
    maps = torch.eye(size, dtype=rows_nDI.dtype).repeat(count, 1, 1)
    for _ in range(20):
        left, _, right = torch.linalg.svd(torch.einsum("ndme,mef->ndf", gram, maps))
        maps = left @ right
    return torch.einsum("nde,ndi->ei", maps, rows_nDI) / count, maps
