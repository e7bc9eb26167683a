"""Which heads to pool together: those whose keys and values are most alike, up to what queries and output can undo.

Alikeness of two heads is the inner product of their rows after the best allowed turn of one towards the other: per
rotary pair the modulus of the complex product, for values the nuclear norm of V_i V_j^T. Keys and values count the
same. Groups of equal size are then chosen greedily and improved by exchanges until none helps.
"""

from __future__ import annotations

import itertools

import torch

from .heads import LayerHeads, output_of
from .pooling import Groups, Metric, mappable, measured


def similar(heads: LayerHeads, kv_heads: int, metric: Metric | None = None) -> Groups:
    """Groups of source heads, `kv_heads` of them, each in ascending order, by their first head. Moving heads moves
    queries and output columns with them: GqaExportError where the output projection is not known."""
    output_of(heads.layout)
    alike = likeness(heads, metric or Metric())
    return partition(alike, kv_heads)


def likeness(heads: LayerHeads, metric: Metric) -> torch.Tensor:
    """[N, N], the larger the more alike; the diagonal is a head's own share of the layer's energy."""
    count = len(heads.layout.key.starts)
    turn_keys, turn_values = mappable(heads.layout)
    keys = torch.stack([measured(heads.key(head), metric.key) for head in range(count)])
    values = torch.stack([measured(heads.value(head), metric.value) for head in range(count)])
    if turn_keys:
        alike = _products(keys[:, list(heads.layout.free)], True)
        if heads.layout.pairs:
            first, second = (list(side) for side in zip(*heads.layout.pairs, strict=True))
            rows = torch.complex(keys[:, first], keys[:, second])
            alike = alike + torch.einsum("npi,mpi->nmp", rows, rows.conj()).abs().sum(-1)
    else:
        alike = _products(keys, False)
    return _share(alike) + _share(_products(values, turn_values))


def _share(product: torch.Tensor) -> torch.Tensor:
    return product / product.diagonal().sum().clamp_min(1e-300)


def _products(parts_NDI: torch.Tensor, turned: bool) -> torch.Tensor:
    """Inner products of heads; `turned`: after the best orthogonal turn of one towards the other."""
    product = torch.einsum("ndi,mdi->nm", parts_NDI, parts_NDI)
    if turned:
        for i, j in itertools.combinations(range(len(product)), 2):
            product[i, j] = product[j, i] = torch.linalg.matrix_norm(parts_NDI[i] @ parts_NDI[j].T, "nuc")
    return product


def partition(alike: torch.Tensor, groups: int) -> Groups:
    """Equal groups with (locally) the largest sum of likeness inside them."""
    count = len(alike)
    size = count // groups
    energy = alike.diagonal().clamp_min(1e-300).sqrt()
    angle = alike / energy[:, None] / energy[None, :]
    left, found = set(range(count)), []
    while left:
        members = [max(left, key=lambda i: (float(angle[i, sorted(left - {i})].max()) if len(left) > 1 else 0.0, -i))]
        left -= set(members)
        while len(members) < size:
            members.append(max(left, key=lambda i: (float(angle[i, members].sum()), -i)))
            left.discard(members[-1])
        found.append(members)
    while _exchange(alike, found):
        pass
    return tuple(sorted(tuple(sorted(members)) for members in found))


def _exchange(alike: torch.Tensor, found: list[list[int]]) -> bool:
    """Make the first exchange of two heads that helps."""
    for one, other in itertools.combinations(found, 2):
        for a, b in itertools.product(range(len(one)), range(len(other))):
            i, j = one[a], other[b]
            rest, others = [h for h in one if h != i], [h for h in other if h != j]
            gain = float(alike[j, rest].sum() + alike[i, others].sum() - alike[i, rest].sum() - alike[j, others].sum())
            if gain > 1e-12:
                one[a], other[b] = j, i
                return True
    return False
