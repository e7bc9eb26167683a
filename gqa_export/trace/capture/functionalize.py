"""In-place updates in a recorded fx graph (`x += y`), turned into the values they compute where that is plain to see.

Recorded, `x += y` is `new = add(x, y); copy_(x, new)`. Where nothing else shares x's memory and `new` is there for the
copy alone, whoever reads x after the copy reads `new`, and the copy is gone. What is less plain (a slice of a larger
tensor is filled) is left for PyTorch's own functionalization, which costs a second recording and takes fewer models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

COPY = torch.ops.aten.copy_.default


def plainly(decompositions: dict[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """The table with `op_` as a copy of what `op` gives, where there is such a pair: `op` may have a translation that
    its parts do not have, and its parts compute in other types."""
    plain = dict(decompositions)
    for overload in decompositions:
        if not isinstance(overload, torch._ops.OpOverload) or torch.Tag.inplace_view in overload.tags:
            continue
        name = overload._schema.name.rpartition("::")[2]
        if name.endswith("_") and not name.endswith("__") and overload is not COPY:
            pair = getattr(getattr(torch.ops.aten, name[:-1], None), overload._overloadname, None)
            if pair is not None:
                plain[overload] = _updated(pair)
    return plain


def _updated(op: Callable[..., Any]) -> Callable[..., Any]:
    def update(changed: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        return changed.copy_(op(changed, *rest, **named))

    return update


def settle(graph: torch.fx.Graph) -> None:
    """Remove the copies that need not be, in place."""
    place = {node: number for number, node in enumerate(graph.nodes)}
    for copy in [node for node in graph.nodes if node.target is COPY]:
        old, new = copy.args[:2]
        if not (isinstance(new, torch.fx.Node) and list(new.users) == [copy] and _alike(old, new)
                and _own_memory(old)):
            continue
        for user in [user for user in old.users if place[user] > place[copy]]:
            user.replace_input_with(old, new)
        copy.replace_all_uses_with(new)
        graph.erase_node(copy)


def writes(graph: torch.fx.Graph) -> bool:
    """Whether an op changes a tensor in place."""
    return any(isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
               for node in graph.nodes)


def _alike(old: torch.fx.Node, new: torch.fx.Node) -> bool:
    """Same type, and sizes that are the same expressions: a copy neither rounds nor broadcasts."""
    was, value = old.meta["val"], new.meta["val"]
    return was.dtype == value.dtype and len(was.shape) == len(value.shape) and all(
        str(size) == str(other) for size, other in zip(was.shape, value.shape))


def _own_memory(node: torch.fx.Node) -> bool:
    """Whether a node was computed, is not an input, and no other node shares its memory (all sharers are counted:
    the nodes it is a view of must have no other reader, and none of its readers may be a view)."""
    if any(_shares(user) for user in node.users):
        return False
    while node.op == "call_function" and _shares(node):
        base = node.args[0] if node.args else None
        if not isinstance(base, torch.fx.Node) or len(base.users) > 1:
            return False
        node = base
    return node.op == "call_function"


def _shares(node: torch.fx.Node) -> bool:
    """Whether a node's result lies in the memory of its input, or may do so."""
    if node.target is COPY:
        return False
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return True
    return any(argument.alias_info is not None for argument in schema.arguments)
