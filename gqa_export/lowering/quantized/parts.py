"""Initializers of packed weights: recipes that name a weight, a form and a part; recorded for who fills them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...graph import edit
from ...graph.node_builder import Nodes
from ...quantized.facts import SEPARATOR, Form, MatrixFacts
from ..context import Context, Held


def hold(context: Context, names: Sequence[str], form: Form) -> None:
    """Note that an operator holds these weights."""
    for name in names:
        held = context.held.get(name, Held())
        if form not in held.forms:
            context.held[name] = replace(held, forms=(*held.forms, form))


def keep_plain(context: Context, name: str, reason: str) -> None:
    """Note that a weight stays floating-point numbers."""
    context.held[name] = Held(reason=reason)


class Parts:
    """Makes the initializers of packed weights, each once."""

    def __init__(self, graph: gs.Graph, context: Context) -> None:
        self.graph, self.context = graph, context
        self._made: dict[tuple[str, tuple[int, ...], int], gs.Tensor] = {}

    def __call__(self, names: Sequence[str], form: Form, part: str, dtype: int, shape: Sequence[int],
                 share: Form | None = None, copy: int = 0) -> gs.Tensor:
        """The part of weights whose rows follow one another.

        Args:
            names: of the weights.
            form: what holds them.
            part: one of `gqa_export.quantized.packing.PARTS`.
            dtype: ONNX element type.
            shape: of the initializer.
            share: the form whose bytes are used, where another operator holds the same.
            copy: which of several initializers with the same bytes, where nodes must not share one.
        """
        owner = share or form
        recipe = "+".join(f"{name}{SEPARATOR}{owner.key}.{part}" for name in names)
        key = (recipe, tuple(shape), copy)
        if key not in self._made:
            for name in names:
                held = self.context.held.get(name, Held())
                known = {**held.parts, f"{name}{SEPARATOR}{owner.key}.{part}": (owner, part)}
                self.context.held[name] = replace(held, parts=known)
            count = sum(1 for made, *_ in self._made if made == recipe)
            label = f"{names[0]}{f'+{len(names) - 1}' if len(names) > 1 else ''}.{owner.key}.{part}"
            self._made[key] = edit.new_weight(f"{label}{f'.{count}' if count else ''}", recipe, dtype, shape)
        return self._made[key]

    def number(self, names: Sequence[str], form: Form, part: str, shape: Sequence[int],
               share: Form | None = None, copy: int = 0) -> gs.Tensor:
        """A part that is floating-point numbers, in the model's type."""
        element = self.context.element
        stored = onnx.TensorProto.FLOAT16 if form.half and part != "shift" else element
        tensor = self(names, form, part, stored, shape, share, copy)
        if stored == element:
            return tensor
        key = (f"{tensor.name}/cast", (), 0)
        if key not in self._made:
            self._made[key] = Nodes(self.graph, tensor.name)("cast", "Cast", tensor, to=element)
        return self._made[key]

    def shift(self, names: Sequence[str], form: Form, facts: MatrixFacts, scale: gs.Tensor,
              shape: Sequence[int]) -> gs.Tensor:
        """What each block adds to its columns, `[N, blocks]` (or the other way round), in the model's type."""
        if not (form.half and facts.offset == "minimum"):
            return self.number(names, form, "shift", shape)
        minimum = self.number(names, form, "minimum", shape)
        key = (f"{minimum.name}/shift", (), 0)
        if key not in self._made:
            node = Nodes(self.graph, minimum.name)
            middle = edit.constant(f"{minimum.name}/middle", np.array(1 << (facts.bits - 1), np.float32),
                                   self.context.element)
            self._made[key] = node("shift", "Add", minimum, node("middle", "Mul", scale, middle))
        return self._made[key]
