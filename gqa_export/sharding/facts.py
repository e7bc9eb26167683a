"""How a tensor is cut over ranks, and the arithmetic of it. R ranks; an axis has `size` entries."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

from ..spec import AttentionSpec

Range = tuple[int, int]
Parts = tuple[tuple[Range, ...], ...]
"""of each rank, the ranges [start, stop) of an axis that it holds, in the order in which it holds them"""
Shape = tuple[int | str | None, ...]


@dataclass(frozen=True)
class Cut:
    """One axis of a tensor, cut: rank r holds the entries `parts[r]`, all of the other axes. An entry may be held by
    several ranks, and by one rank several times."""

    axis: int
    parts: Parts

    def size(self, rank: int) -> int:
        """Entries that a rank holds."""
        return sum(stop - start for start, stop in self.parts[rank])

    def at(self, axis: int) -> Cut:
        """The same parts of another axis."""
        return Cut(axis, self.parts)


class CannotShard(Exception):
    """A cut cannot go on: the node that it ended at, and why.

    Attributes:
        node: its name and operator; "" where it is not one node.
        reason: what was expected there.
        code: of the refusal.
    """

    def __init__(self, node: str, reason: str, code: str = "E-MODEL-SHARD-RULE") -> None:
        super().__init__(f"{node}: {reason}" if node else reason)
        self.node, self.reason, self.code = node, reason, code


def joined(ranges: list[Range]) -> tuple[Range, ...]:
    """Ranges that follow one another put together, empty ones dropped; the order stays."""
    found: list[Range] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def even(size: int, ranks: int) -> Parts:
    """An axis cut into consecutive parts as equal as they can be."""
    return tuple(((r * size // ranks, (r + 1) * size // ranks),) for r in range(ranks))


def is_whole(parts: Parts, size: int) -> bool:
    """Whether every rank holds all of an axis, in order."""
    return all(part == ((0, size),) for part in parts)


def copies(parts: Parts, size: int) -> int:
    """How often each entry of an axis is held, over all ranks; 0 where that is not the same number for all."""
    counts = [0] * (size + 1)
    for part in parts:
        for start, stop in part:
            counts[start] += 1
            counts[stop] -= 1
    total, seen = 0, set[int]()
    for change in counts[:-1]:
        total += change
        seen.add(total)
    return seen.pop() if len(seen) == 1 else 0


def held_heads(layer: AttentionSpec, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Of each rank the K/V heads it holds: those that its consecutive H/R query heads read, in their order.

    Groups stay equal within a rank: where a rank's queries begin inside a group, its heads are cut into groups of
    gcd(H/K, H/R), and a K/V head that two of those read is held twice.
    """
    queries, group = layer.num_heads // ranks, layer.num_heads // layer.kv_num_heads
    own = gcd(queries, group)
    return tuple(tuple((r * queries + first) // group for first in range(0, queries, own)) for r in range(ranks))


def head_parts(heads: tuple[tuple[int, ...], ...], size: int) -> Parts:
    """Heads of each rank as ranges of an axis of heads * size entries."""
    return tuple(joined([(head * size, (head + 1) * size) for head in held]) for held in heads)


def through_reshape(cut: Cut, before: Shape, after: Shape) -> Cut | None:
    """The cut of a reshaped tensor; None where it is not a cut of one axis there.

    Args:
        cut: of the tensor before.
        before: its shape.
        after: the shape it gets.
    """
    group_before, group_after = _group(cut.axis, before, after)
    sizes = [before[axis] for axis in group_before]
    if not group_after or not all(isinstance(size, int) for size in (*sizes, *(after[a] for a in group_after))):
        return None
    numbers = [size for size in sizes if isinstance(size, int)]
    place = group_before.index(cut.axis)
    outer, inner, size = prod(numbers[:place]), prod(numbers[place + 1:]), numbers[place]
    flat = tuple(joined([((o * size + start) * inner, (o * size + stop) * inner) for o in range(outer)
                         for start, stop in part]) for part in cut.parts)
    targets = [each for axis in group_after if isinstance(each := after[axis], int)]
    for position, axis in enumerate(group_after):
        outer, inner = prod(targets[:position]), prod(targets[position + 1:])
        parts = tuple(_unflat(part, outer, targets[position], inner) for part in flat)
        found = tuple(part for part in parts if part is not None)
        if len(found) == len(parts):
            return Cut(axis, found)
    return None


def _unflat(flat: tuple[Range, ...], outer: int, size: int, inner: int) -> tuple[Range, ...] | None:
    """Ranges of outer * size * inner entries as ranges of the middle axis, the same in each of `outer`; else None."""
    total, found = size * inner, list[tuple[Range, ...]]()
    for o in range(outer):
        low, high = o * total, (o + 1) * total
        inside = joined([(max(a, low) - low, min(b, high) - low) for a, b in flat if a < high and b > low])
        found.append(inside)
    first = found[0]
    if any(each != first for each in found) or any(a % inner or b % inner for a, b in first):
        return None
    return tuple((a // inner, b // inner) for a, b in first)


def _group(axis: int, before: Shape, after: Shape) -> tuple[list[int], list[int]]:
    """The axes before and after that a reshape makes of one another and that `axis` is among."""
    i, j = len(before), len(after)
    while i > axis and j:  # from the last axes on, as long as their sizes are numbers
        last_i, last_j = i, j
        i, j = i - 1, j - 1
        while i >= 0 and j >= 0 and all(isinstance(size, int) for size in (*before[i:last_i], *after[j:last_j])):
            left, right = _product(list(before[i:last_i]))[0], _product(list(after[j:last_j]))[0]
            if left == right:
                break
            i, j = (i - 1, j) if left < right else (i, j - 1)
        else:
            break
        if axis >= i:
            return list(range(i, last_i)), list(range(j, last_j))
    i = j = 0
    while i < len(before) and j < len(after):
        first_i, first_j = i, j
        these, those = [before[i]], [after[j]]
        i, j = i + 1, j + 1
        while _product(these) != _product(those):
            if i < len(before) and (j >= len(after) or _smaller(these, those)):
                these.append(before[i])
                i += 1
            elif j < len(after):
                those.append(after[j])
                j += 1
            else:
                break
        if axis < i:
            # axes of one entry belong to a group of their own, unless they are all that is left
            return list(range(first_i, i)), list(range(first_j, j))
    return [axis], []


def _product(sizes: list[int | str | None]) -> tuple[int, tuple[str, ...]]:
    return prod(size for size in sizes if isinstance(size, int)), tuple(
        sorted(str(size) for size in sizes if not isinstance(size, int)))


def _smaller(left: list[int | str | None], right: list[int | str | None]) -> bool:
    a, b = _product(left), _product(right)
    return (len(a[1]), a[0]) < (len(b[1]), b[0]) or (len(a[1]) == len(b[1]) and a[0] < b[0])
