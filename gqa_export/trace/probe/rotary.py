"""Rotary types that a graph can hold. Source: transformers `modeling_rope_utils`.

`default`, `linear`, `llama3`, `yarn` and others depend on position alone. `longrope` has two tables: the long one
serves sequences beyond the original length. Both are in the graph, and each sequence of a call chooses by its own
longest position, as transformers does for a sequence alone (of a batch, transformers lets the longest choose for all).
`dynamic` recomputes its frequencies for every length beyond max_position_embeddings; up to there it is one table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...errors import UnsupportedModel

LONGROPE = "longrope"
WHERE = "config.json: rope_parameters"
STATE = "gqa_rope_state"
"""attribute of a rotary module with two tables: a dict whose entry "longest" is the longest position + 1 of each
sequence of the call that is traced, [batch]"""


@dataclass(frozen=True)
class Regime:
    """How a model's rotary embedding depends on the length.

    Attributes:
        name: "short" (longrope, capacity within the original length), "both" (longrope beyond it), "dynamic", or "".
        switch: with "both", the tokens up to which the short table serves; else 0.
    """

    name: str = ""
    switch: int = 0


def rope_types(config: Any) -> list[str]:
    """The distinct rotary types that a transformers config names, in order; empty without rotary embeddings."""
    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for name, value in node.items():
                if name in ("rope_type", "type") and isinstance(value, str):
                    yield value
                elif name != "type":
                    yield from walk(value)

    found: list[str] = []
    for field in ("rope_parameters", "rope_scaling"):
        found += [kind for kind in walk(getattr(config, field, None) or {}) if kind not in found]
    return found


def tables_of(config: Any) -> dict[str | None, dict[str, Any]]:
    """The rotary parameters of a transformers config by type of layer; of a config with one set for all, by None."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = {name: value for name, value in rope.items() if isinstance(value, dict)}
    return nested or {None: rope}


def original_length(config: Any, table: dict[str, Any]) -> int:
    """The length that a scaled rotary was trained for; 0 where none is given."""
    return int(table.get("original_max_position_embeddings")
               or getattr(config, "original_max_position_embeddings", 0)
               or getattr(config, "max_position_embeddings", 0) or 0)


def longest(config: Any) -> int:
    """The tokens that a transformers config is made for; 0 where it names no bound.

    That is max_position_embeddings, or what a rotary scaling makes of the length it starts from, if that is more: the
    cards of Qwen add `"factor": 4` to a configuration whose max_position_embeddings stays.
    """
    bound = max(int(getattr(config, "max_position_embeddings", 0) or 0), 0)  # XLNet's is -1
    for table in tables_of(config).values():
        factor = table.get("factor")
        if bound and table.get("original_max_position_embeddings") and isinstance(factor, int | float):
            bound = max(bound, int(original_length(config, table) * factor))
    return bound


def switch_of(config: Any, capacity: int) -> int:
    """The tokens up to which a `longrope` model of this capacity uses its short table; 0: it never uses another.

    Raises:
        UnsupportedModel: layers change their tables at different lengths.
    """
    lengths = {original_length(config, table) for table in tables_of(config).values()
               if table.get("rope_type", table.get("type")) == LONGROPE}
    lengths = {length for length in lengths if 0 < length < capacity}
    if len(lengths) > 1:
        raise UnsupportedModel(f"layers change their longrope tables at different lengths: {sorted(lengths)}", WHERE,
                               f"use --capacity {min(lengths)} or less, where one table serves",
                               code="E-MODEL-ROPE-SWITCHES")
    return min(lengths, default=0)


def check_rope(config: Any) -> None:
    """Raise UnsupportedModel for a rotary type that transformers does not know."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for kind in rope_types(config):
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            raise UnsupportedModel(f"the installed transformers does not know the rotary type `{kind}`", WHERE,
                                   f"known are: default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}; correct the "
                                   "checkpoint or install a newer transformers", code="E-MODEL-ROPE-UNKNOWN")


def check_dynamic(config: Any, capacity: int) -> None:
    """Raise UnsupportedModel for a `dynamic` rotary beyond the length up to which it is one table."""
    limit = int(getattr(config, "max_position_embeddings", 0) or 0)
    for kind in rope_types(config):
        if "dynamic" in kind and capacity > limit:
            raise UnsupportedModel(f"rotary type `{kind}` changes its frequencies with every length beyond {limit} "
                                   f"tokens, and the capacity is {capacity}", WHERE,
                                   f"use --capacity {limit} or less, where its frequencies are fixed; for longer "
                                   "texts take a checkpoint whose rotary type depends on position alone (yarn, llama3)",
                                   code="E-MODEL-ROPE-DYNAMIC")


def settle(model: torch.nn.Module, capacity: int) -> Regime:
    """Replace what the model's rotary modules decide by length in Python by what a graph can hold.

    `dynamic` is fixed to its frequencies up to max_position_embeddings. `longrope` is fixed to the short table if the
    capacity is within the original length; else its modules give both, and choose by `STATE`.

    Raises:
        UnsupportedModel: a `dynamic` rotary beyond its limit, or `longrope` with several lengths.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    switch, found = switch_of(config, capacity), ""
    check_dynamic(config, capacity)
    for any_module in model.modules():
        module: Any = any_module
        kinds = getattr(module, "rope_type", None)
        kinds = {None: kinds} if isinstance(kinds, str) else kinds
        if not isinstance(kinds, dict) or not hasattr(module, "config"):
            continue
        moving = {place: kind for place, kind in kinds.items() if kind == LONGROPE or "dynamic" in kind}
        long = [place for place, kind in moving.items() if kind == LONGROPE]
        for place in long:
            _take_tables(module, place, switch)
        if moving:  # the module's own update looks at its rope_type
            module.rope_type = {**kinds, **dict.fromkeys(moving, "default")} if None not in kinds else "default"
            found = ("both" if switch else "short") if long else found or "dynamic"
        if long:
            _choose_by_length(module, long, switch)
    return Regime(found, switch if found == "both" else 0)


def states(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The `STATE` of every rotary module that holds two tables."""
    return [getattr(module, STATE) for module in model.modules() if hasattr(module, STATE)]


def _prefix(place: str | None) -> str:
    return "" if place is None else f"{place}_"


def _take_tables(module: Any, place: str | None, switch: int) -> None:
    """Give a rotary module its short frequencies, and where there is a switch the long ones beside them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    prefix, original = _prefix(place), original_length(module.config, tables_of(module.config)[place])
    if not hasattr(module, f"{prefix}inv_freq"):
        return
    device = getattr(module, f"{prefix}inv_freq").device
    for name, length in (("inv_freq", original), *([("long_inv_freq", original + 1)] if switch else [])):
        frequencies, scaling = ROPE_INIT_FUNCTIONS[LONGROPE](
            module.config, torch.device("cpu"), seq_len=length, **({} if place is None else {"layer_type": place}))
        setattr(module, f"{prefix}{name}", torch.nn.Buffer(frequencies.to(device), persistent=False))
        setattr(module, f"{prefix}attention_scaling", scaling)


def _choose_by_length(module: Any, places: list[str | None], switch: int) -> None:
    """Let a rotary module answer as for a sequence within `switch` tokens, or for each sequence of the call as for its
    own length. switch 0: it never gets longer."""
    whole, state = module.forward, dict[str, Any]()
    if switch:
        setattr(module, STATE, state)

    def forward(*args: Any, **kwargs: Any) -> Any:
        positions, place = (kwargs.get(name, args[number] if len(args) > number else None)
                            for number, name in ((1, "position_ids"), (2, "layer_type")))
        if place not in places:
            return whole(*args, **kwargs)
        with _Longest(positions, switch or 1):
            short = whole(*args, **kwargs)
        longest = state.get("longest")
        if longest is None:
            return short
        name = f"{_prefix(place)}inv_freq"
        kept = getattr(module, name)
        setattr(module, name, getattr(module, f"{_prefix(place)}long_inv_freq"))
        try:
            with _Longest(positions, switch + 1):
                long = whole(*args, **kwargs)
        finally:
            setattr(module, name, kept)
        beyond_B11 = (longest > switch)[:, None, None]
        return tuple(torch.where(beyond_B11, far, near) for far, near in zip(long, short))

    module.forward = forward


class _Longest(TorchFunctionMode):
    """Inside, the largest of these positions is `length` - 1: models that compare it (Phi-3.5-MoE) take one way."""

    def __init__(self, positions: torch.Tensor | None, length: int) -> None:
        super().__init__()
        self._positions, self._length = positions, length

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.max, torch.Tensor.max) and len(args) == 1 and args[0] is self._positions and not kwargs:
            return self._length - 1
        return func(*args, **(kwargs or {}))
