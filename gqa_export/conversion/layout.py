"""Where every head's rows lie in a model's weights, as data. `head_layout_probe` finds it. Dimensions: H query heads, N
key/value heads, D and E sizes of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Heads:
    """The rows (columns, if `transposed`) `start .. start + size` of `weight` (and `bias`, "" if none), by head."""

    weight: str
    bias: str
    transposed: bool
    starts: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class LayerLayout:
    """One attention layer. output: its starts are input features of the output projection; None if something (a gate,
    a norm) lies between attention and it.

    pairs: features of a key head that its rotary embedding turns together, as (first, second): second follows first
    by a quarter turn. linear: roles with nothing but rotary between projection and attention. sinks: parameter of
    [H] logits, "" if none. path: dotted name of the attention module.
    """

    layer: int
    path: str
    query: Heads
    key: Heads
    value: Heads
    output: Heads | None
    pairs: tuple[tuple[int, int], ...]
    linear: frozenset[str]
    sinks: str = ""

    @property
    def free(self) -> tuple[int, ...]:
        """Features of a key head that rotary leaves alone."""
        turned = {feature for pair in self.pairs for feature in pair}
        return tuple(feature for feature in range(self.key.size) if feature not in turned)

    def moved(self, layer: int, path: str) -> LayerLayout:
        """The layout of another layer whose module is alike."""
        def renamed(heads: Heads) -> Heads:
            names = [path + name.removeprefix(self.path) if name else "" for name in (heads.weight, heads.bias)]
            return replace(heads, weight=names[0], bias=names[1])

        return replace(self, layer=layer, path=path, query=renamed(self.query), key=renamed(self.key),
                       value=renamed(self.value), output=renamed(self.output) if self.output else None,
                       sinks=path + self.sinks.removeprefix(self.path) if self.sinks else "")

    def parameters(self) -> set[str]:
        """Names of all parameters that hold heads."""
        roles = [self.query, self.key, self.value] + ([self.output] if self.output else [])
        return {name for role in roles for name in (role.weight, role.bias) if name} | ({self.sinks} - {""})
