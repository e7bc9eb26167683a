"""transformers' growing cache with room for what comes: a step writes its keys and values behind those that are there.

transformers joins the old and the new ones into another tensor at every step. Of a long sequence that is most of what a
step copies, and the tensors that are given back lie scattered over the heap, too small for the next ones.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer's cache. Keys and values are views of memory that at least doubles; what was handed out never changes.

    capacity: tokens that a sequence may reach.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._capacity = capacity
        self._rooms: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See transformers' `CacheLayerMixin.update`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._with("keys", key_states), self._with("values", value_states)
        return self.keys, self.values

    def _with(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """All keys, or values: those that are there and new ones [B, K, S, D]."""
        held: torch.Tensor = getattr(self, name)
        if held.dim() != new.dim():  # there are none: transformers begins with an empty tensor of one axis
            held = new[..., :0, :]
        if held.dtype != new.dtype:
            return torch.cat([held, new], dim=-2)
        count, total = held.shape[-2], held.shape[-2] + new.shape[-2]
        room, known = self._rooms.get(name, (held, None))
        # another tensor than was left here is a shorter one: what it is a view of was handed out whole
        if known is not held or room.shape[-2] < total:
            tokens = max(total, min(2 * count, self._capacity))
            room = new.new_empty((*new.shape[:-2], tokens, new.shape[-1]))
            room[..., :count, :] = held
        room[..., count:total, :] = new
        self._rooms[name] = room, room[..., :total, :]
        return self._rooms[name][1]


def roomy_cache(capacity: int) -> DynamicCache:
    """An empty cache for one sequence of at most `capacity` tokens."""
    cache: Any = DynamicCache()
    cache.layer_class_to_replicate = partial(RoomyLayer, capacity)
    return cache
