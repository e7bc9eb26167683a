"""Where every head's rows lie in a model's weights: found by probing its attention modules, not by knowing them.

Each attention module is copied without its weights; its linear layers are replaced by probes that return numbers of
ours, and it is run on one token. What reaches attention then depends on those numbers: derivatives tell which output
rows make key head 3, which pairs of features its rotary embedding turns, and whether a norm lies between. Dimensions:
H query heads, N key/value heads, D and E sizes of keys and values.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnsupportedModel
from ..trace.attention_hook import Call, recording
from .layout import Heads, LayerLayout

COSINE, SINE = 0.8, 0.6  # one angle for every frequency: whatever the layout of the tables, pairs show
ROUNDING = 1e-5  # some models rotate in fp32 whatever their type
PLURAL = {"query": "queries", "key": "keys", "value": "values"}
FIX = "convert a decoder whose layers each make their own keys and values by one linear layer"


class _Probe(torch.nn.Module):
    """Stands for a linear layer: returns `out`, remembers what it was given."""

    def __init__(self, linear: torch.nn.Module, name: str) -> None:
        super().__init__()
        weight: Any = linear.weight
        self.name, self.transposed = name, not isinstance(linear, torch.nn.Linear)
        self.has_bias = getattr(linear, "bias", None) is not None
        self.size = int(weight.shape[1] if self.transposed else weight.shape[0])
        self.generator = torch.Generator().manual_seed(len(name))
        self.given: torch.Tensor | None = None
        self.renew()

    def renew(self) -> None:
        """Other numbers."""
        self.out = torch.randn(self.size, generator=self.generator, dtype=torch.float64).requires_grad_()

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., size], the numbers of this probe for every token."""
        self.given = given
        return self.out.expand(*given.shape[:-1], self.size)


@dataclass
class _Answer:
    """Takes the attention call of one module; every head of the answer is filled with its own number, 1 .. H."""

    call: Call | None = None

    def attend(self, call: Call) -> torch.Tensor:
        self.call = call
        batch, heads, tokens, _ = call.query.shape
        tags = torch.arange(1, heads + 1, dtype=call.value.dtype)
        return tags[None, None, :, None].expand(batch, tokens, heads, call.value.shape[-1]).contiguous()


AttentionCall = tuple[str, torch.nn.Module, tuple[Any, ...], dict[str, Any]]
"""path, module, arguments and keywords of an attention call"""


def attention_modules(model: torch.nn.Module) -> dict[int, AttentionCall]:
    """layer -> (path, module, arguments, keywords) of every attention call of a skeleton on the meta device."""
    from ..trace.probe.layer_probe import listen

    calls = listen(model)
    paths = {id(module): path for path, module in model.named_modules()}
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    hooks = [call.module.register_forward_pre_hook(
        lambda _, given, named, layer=layer: seen.__setitem__(layer, (given, named)), with_kwargs=True)
        for layer, call in calls.items()]
    try:
        listen(model)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: (paths[id(call.module)], call.module, *seen[layer]) for layer, call in sorted(calls.items())}


def layouts(model: torch.nn.Module) -> tuple[LayerLayout, ...]:
    """The layout of every attention layer of a skeleton. Modules that are alike in everything are probed once.

    Args:
        model: on the meta device, with our attention.

    Raises:
        UnsupportedModel: keys and values are made in a way that cannot be pooled.
    """
    known: dict[tuple[Any, ...], LayerLayout] = {}
    found = []
    for layer, (path, module, given, named) in attention_modules(model).items():
        key = (*_likeness(module), repr(_shapes(given)), repr(_shapes(sorted(named.items()))))
        if key not in known:
            known[key] = _Probed(layer, path, module, given, named).layout()
        found.append(known[key].moved(layer, path))
    return tuple(found)


def _likeness(module: torch.nn.Module) -> tuple[Any, ...]:
    """Classes, numbers and shapes of a module and all in it, its place apart."""
    return tuple((name, type(part).__qualname__, tuple(sorted(
        (key, repr(value)) for key, value in vars(part).items()
        if isinstance(value, bool | int | float | str | None) and not key.startswith("_") and key != "layer_idx")),
        tuple((key, tuple(value.shape)) for key, value in part.named_parameters(recurse=False)))
        for name, part in module.named_modules())


def _shapes(values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        return tuple(values.shape)
    return tuple(_shapes(value) for value in values) if isinstance(values, tuple | list) else type(values).__name__


def _ordinary(value: Any) -> Any:
    """The same argument on the CPU: rotary tables at one angle, other tensors zero, one token."""
    if isinstance(value, torch.Tensor):
        kind = torch.float64 if value.is_floating_point() else value.dtype
        return torch.zeros([1 if size == 8 and at == 1 else size for at, size in enumerate(value.shape)], dtype=kind)
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(item, torch.Tensor) for item in value):
        shape = [1 if at == value[0].ndim - 2 else size for at, size in enumerate(value[0].shape)]
        return (torch.full(shape, COSINE, dtype=torch.float64), torch.full(shape, SINE, dtype=torch.float64))
    return value


class _Probed:
    """A copy of one attention module whose linear layers are probes."""

    def __init__(self, layer: int, path: str, module: torch.nn.Module, given: tuple[Any, ...],
                 named: dict[str, Any]) -> None:
        self.layer, self.path, self.place = layer, path, f"layer {layer}, {type(module).__name__}"
        from transformers.pytorch_utils import Conv1D

        self.module = copy.deepcopy(module)
        self.probes: list[_Probe] = []
        for name, child in list(self.module.named_modules()):
            if isinstance(child, torch.nn.Linear | Conv1D):
                probe = _Probe(child, name)
                self.module.set_submodule(name, probe)
                self.probes.append(probe)
        self.module.to_empty(device="cpu")
        self.module.double()
        for index, parameter in enumerate(self.module.parameters()):
            parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(index))
        for buffer in self.module.buffers():
            buffer.zero_()
        self.given = tuple(_ordinary(value) for value in given)
        self.named = {name: _ordinary(value) for name, value in named.items()}
        self.call = self.run()

    def run(self) -> Call:
        """The call that this module makes, with the probes' numbers as they are."""
        answer = _Answer()
        with recording(answer):
            self.module(*self.given, **self.named)
        assert answer.call is not None
        return answer.call

    def layout(self) -> LayerLayout:
        """Everything that `LayerLayout` holds."""
        query = self.heads("query", self.call.query)
        key, value = self.heads("key", self.call.key), self.heads("value", self.call.value)
        return LayerLayout(self.layer, self.path, query, key, value, self.output(), self.pairs(key),
                           self.linear({"query": query, "key": key, "value": value}), self.sinks())

    def slope(self, number: torch.Tensor) -> list[torch.Tensor | None]:
        """Derivative of one number by every probe's numbers; None where there is none."""
        if not number.requires_grad:
            return [None] * len(self.probes)
        outs = [probe.out for probe in self.probes]
        return list(torch.autograd.grad(number, outs, retain_graph=True, allow_unused=True))

    def heads(self, role: str, heads_BNSD: torch.Tensor) -> Heads:
        """Which rows of which linear layer make each head."""
        count, size = heads_BNSD.shape[1], heads_BNSD.shape[-1]
        weights = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        starts, sources = [], set()
        for head in range(count):
            slopes = self.slope((heads_BNSD[0, head, 0] * weights).sum())
            found = [(index, slope.nonzero().flatten()) for index, slope in enumerate(slopes)
                     if slope is not None and slope.any()]
            if not found:
                self.refuse(f"the {PLURAL[role]} of this layer do not come from a linear layer of its own")
            if len(found) > 1:
                self.refuse(f"its {PLURAL[role]} come from several linear layers")
            index, rows = found[0]
            sources.add(index)
            if len(rows) > size:
                self.refuse(f"a norm over all heads mixes its {role} heads")
            if len(rows) != size or int(rows[-1]) - int(rows[0]) != size - 1:
                self.refuse(f"the rows of its {role} heads do not lie together")
            starts.append(int(rows[0]))
        if len(sources) > 1 or len(set(starts)) != count:
            self.refuse(f"several {role} heads share rows of a linear layer")
        return self.named_heads(self.probes[sources.pop()], tuple(starts), size)

    def named_heads(self, probe: _Probe, starts: tuple[int, ...], size: int) -> Heads:
        """Heads in the model's own names."""
        name = ".".join(part for part in (self.path, probe.name) if part)
        return Heads(f"{name}.weight", f"{name}.bias" if probe.has_bias else "", probe.transposed, starts, size)

    def output(self) -> Heads | None:
        """The linear layer that is given attention's answer as it is, and where each head lies in its input."""
        heads, size = self.call.query.shape[1], self.call.value.shape[-1]
        for probe in self.probes:
            if probe.given is None or probe.given.shape[-1] != heads * size:
                continue
            tags = probe.given.reshape(-1, heads * size)[0].detach()
            starts = [(tags == head).nonzero().flatten() for head in range(1, heads + 1)]
            if all(len(rows) == size and int(rows[-1]) - int(rows[0]) == size - 1 for rows in starts):
                return self.named_heads(probe, tuple(int(rows[0]) for rows in starts), size)
        return None

    def pairs(self, key: Heads) -> tuple[tuple[int, int], ...]:
        """Which features of a key head rotary turns together: e_i becomes COSINE e_i + SINE e_j for a pair (i, j)."""
        if "key" not in self.linear({"key": key}):
            return ()
        found = []
        for feature in range(key.size):
            slope = next(s for s in self.slope(self.call.key[0, 0, 0, feature]) if s is not None and s.any())
            row = slope[key.starts[0]: key.starts[0] + key.size]
            others = [int(i) for i in row.nonzero().flatten() if int(i) != feature]
            if not others:
                continue
            ratio = float(row[others[0]] / row[feature])
            if len(others) > 1 or abs(abs(ratio) - SINE / COSINE) > ROUNDING:
                self.refuse("its position embedding does not rotate pairs of features")
            if ratio > 0:  # this feature receives from `others[0]` with a plus: it is the second of its pair
                found.append((others[0], feature))
        return tuple(sorted(found))

    def linear(self, roles: dict[str, Heads]) -> frozenset[str]:
        """Those roles whose slope stays the same when all numbers change."""
        before = {role: self.first_slope(role, heads) for role, heads in roles.items()}
        old, outs = self.call, [probe.out for probe in self.probes]
        for probe in self.probes:
            probe.renew()
        self.call = self.run()
        after = {role: self.first_slope(role, heads) for role, heads in roles.items()}
        self.call = old
        for probe, out in zip(self.probes, outs, strict=True):
            probe.out = out
        return frozenset(role for role in roles if torch.allclose(before[role], after[role], atol=ROUNDING))

    def first_slope(self, role: str, heads: Heads) -> torch.Tensor:
        """Derivative of the sum of a role's first head by the rows of that head."""
        numbers = getattr(self.call, role)[0, 0, 0]
        weights = torch.arange(1, heads.size + 1, dtype=torch.float64)
        slope = next(s for s in self.slope((numbers * weights).sum()) if s is not None and s.any())
        return slope[heads.starts[0]: heads.starts[0] + heads.size]

    def sinks(self) -> str:
        """Name of the parameter that attention is given as sinks."""
        if self.call.sinks is None:
            return ""
        for name, parameter in self.module.named_parameters():
            if parameter.data_ptr() == self.call.sinks.data_ptr():
                return f"{self.path}.{name}"
        return self.refuse("its attention sinks are not a parameter of their own")

    def refuse(self, reason: str) -> Any:
        """Always raises UnsupportedModel."""
        raise UnsupportedModel(f"keys and values of this architecture cannot be pooled: {reason}", self.place, FIX,
                               code="E-CONVERT-LAYOUT")
