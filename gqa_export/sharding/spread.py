"""Cuts spread over a graph from where they are set, in both directions, until nothing follows or nothing fits."""

from __future__ import annotations

from collections import deque

import onnx

from .facts import CannotShard, Cut, is_whole
from .rules import rule_of
from .taken import packed, pieces
from .view import View, is_attention, label


class Cuts:
    """The cuts of a graph's tensors that are known so far.

    Attributes:
        known: by tensor.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.known: dict[str, Cut] = {}
        self._added: list[str] = []
        self._apart: dict[tuple[str, int], None] = {}

    def spread(self, *seeds: dict[str, Cut]) -> None:
        """Set the cuts of some tensors and all that follow. seeds: by tensor.

        Raises:
            CannotShard: an operator has no rule, or two cuts of a tensor differ.
        """
        self._added = []
        waiting: deque[str] = deque()
        for each in seeds:
            for name, cut in each.items():
                self._set(name, cut, None, waiting)
        while waiting or self._apart:
            while waiting:
                self._around(waiting.popleft(), waiting)
            for whole, axis in list(self._apart):
                together = packed(self.view, whole, axis, self.known)
                if together is not None:
                    self._set(whole, together, self.view.made_by.get(whole), waiting)
            self._apart.clear()

    def attempt(self, *seeds: dict[str, Cut]) -> CannotShard | None:
        """As `spread`; where that cannot be, nothing is set, and the reason is given."""
        try:
            self.spread(*seeds)
        except CannotShard as reason:
            for name in self._added:
                del self.known[name]
            self._apart.clear()
            return reason
        return None

    def _around(self, name: str, waiting: deque[str]) -> None:
        view = self.view
        maker = view.made_by.get(name)
        if maker is None and name not in view.initializers:
            raise CannotShard("", f"the input {name!r} of the graph would be cut")
        if name in view.outputs:
            raise CannotShard("", f"the output {name!r} of the graph would be cut")
        around: list[onnx.NodeProto] = [*([maker] if maker is not None else []), *view.read_by.get(name, ())]
        for node in around:
            if node.op_type == "Constant":
                continue
            if is_attention(node) and name not in self._ports_cut(node):
                raise CannotShard(label(node), f"its input {name!r} would be cut otherwise than by heads")
            for other, cut in rule_of(node)(view, node, self.known).items():
                self._set(other, cut, node, waiting)
            if node.op_type in ("Slice", "Split") and node is maker:
                for piece, axis, _, _ in pieces(view, node):
                    if piece == name and axis == self.known[name].axis and node.input[0] not in self.known:
                        self._apart[node.input[0], axis] = None

    def _ports_cut(self, node: onnx.NodeProto) -> list[str]:
        places = (0, 1, 2, 9)
        return [*(node.input[place] for place in places if len(node.input) > place), node.output[0]]

    def _set(self, name: str, cut: Cut, node: onnx.NodeProto | None, waiting: deque[str]) -> None:
        size = self.view.size(name, cut.axis)
        if isinstance(size, int) and is_whole(cut.parts, size):
            if name in self.known:
                raise CannotShard(label(node) if node is not None else "", f"{name!r} is cut and whole at once")
            return
        if name in self.known:
            if self.known[name] != cut:
                raise CannotShard(label(node) if node is not None else "", f"two different cuts of {name!r} meet")
            return
        if any(not part for part in cut.parts):
            raise CannotShard("", f"some ranks would hold nothing of {name!r}")
        self.known[name] = cut
        self._added.append(name)
        waiting.append(name)
