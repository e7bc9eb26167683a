"""`calibrated`: each layer fitted to what it really computes on a text, layer after layer, in one pass.

The model runs once on two copies of the text. In the first copy every attention layer answers as the source does; in
the second as the converted layers before it make it. At each layer, least squares: keys of a group get their best
common rows (weighted by second moments of the layer's input and of the queries), values theirs (weighted by what
attention averages and what the output projection makes of it), and the output projection is fitted so that the second
copy's answer comes nearest to the first's. Dimensions: B texts, S tokens each, T = B * S.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..trace.attention_hook import Call, recording
from .assemble import assemble
from .head_similarity import similar
from .heads import LayerHeads
from .layout import Heads, LayerLayout
from .pooling import Metric, Pooled, contiguous, mappable, pool
from .weight_error import LayerError, weight_errors

RIDGE = 0.02
"""how strongly the fitted output projection is drawn to the unfitted one, as a part of the features' mean square"""


class Attend:
    """Eager attention that remembers its call. visible: as in `AttentionSpec`.

    `each(query_head, weights_BSS)` sees the softmax weights."""

    def __init__(self, visible: int, each: Callable[[int, torch.Tensor], None] | None = None) -> None:
        self.visible, self.each = visible, each
        self.call: Call | None = None
        self.answer: torch.Tensor | None = None

    def attend(self, call: Call) -> torch.Tensor:
        """[B, S, H, E]."""
        self.call = call
        batch, heads, tokens, _ = call.query.shape
        group = heads // call.key.shape[1]
        place = torch.arange(tokens)
        hidden = place[None, :] > place[:, None]
        if self.visible > 0:
            hidden |= place[None, :] <= place[:, None] - self.visible
        elif self.visible < 0:
            hidden |= place[None, :] // -self.visible < place[:, None] // -self.visible
        answer = call.value.new_empty(batch, tokens, heads, call.value.shape[-1])
        for head in range(heads):
            scores = call.query[:, head].float() @ call.key[:, head // group].float().transpose(1, 2) * call.scale
            if call.softcap:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            scores.masked_fill_(hidden, float("-inf"))
            if call.sinks is not None:
                sink = call.sinks[head].float().expand(batch, tokens, 1)
                weights = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
            else:
                weights = torch.softmax(scores, dim=-1)
            if self.each:
                self.each(head, weights)
            answer[:, :, head] = (weights @ call.value[:, head // group].float()).to(answer.dtype)
        self.answer = answer
        return answer


@contextmanager
def inputs_of(module: torch.nn.Module, name: str) -> Iterator[list[torch.Tensor]]:
    """Collects what a submodule is given."""
    given: list[torch.Tensor] = []
    hook = module.get_submodule(name).register_forward_pre_hook(lambda _, values: given.append(values[0].detach()))
    try:
        yield given
    finally:
        hook.remove()


def with_one(rows: torch.Tensor) -> torch.Tensor:
    """[..., in] -> [T, in + 1] fp32, the last column ones (the biases' input)."""
    flat = rows.reshape(-1, rows.shape[-1]).float()
    return torch.cat((flat, flat.new_ones(len(flat), 1)), dim=1)


def second_moments(rows_TI: torch.Tensor) -> torch.Tensor:
    """Mean of x x^T over the rows, [I, I] fp64."""
    return (rows_TI.T @ rows_TI).double() / len(rows_TI)


def root(moments: torch.Tensor) -> torch.Tensor:
    """L with L L^T = moments (symmetric, not negative), fp64."""
    values, vectors = torch.linalg.eigh((moments + moments.T) / 2)
    return vectors * values.clamp_min(0).sqrt()


def inner(heads: Heads, path: str) -> str:
    """The linear layer that holds these heads, as the attention module names it."""
    return heads.weight.removesuffix(".weight").removeprefix(f"{path}.")


class LayerFit:
    """One attention layer on both copies of the text."""

    def __init__(self, heads: LayerHeads, target: LayerLayout, module: torch.nn.Module, visible: int) -> None:
        self.heads, self.target, self.module, self.visible = heads, target, module, visible
        self.layout = heads.layout

    def source(self, run: Callable[[torch.nn.Module], Any]) -> tuple[Any, Metric]:
        """Run the source's layer on the first copy; what it returned, and the metric of its inputs."""
        averaged: list[torch.Tensor] = []

        def each(head: int, weights: torch.Tensor) -> None:
            rows = with_one(given[0]).reshape(*weights.shape[:2], -1)
            moments = second_moments((weights @ rows).reshape(-1, rows.shape[-1]))
            averaged[:] = [averaged[0] + moments if averaged else moments]

        attend = Attend(self.visible, each)
        with inputs_of(self.module, inner(self.layout.key, self.layout.path)) as given, recording(attend):
            result = run(self.module)
        assert attend.call is not None
        square = attend.call.query.double().square().mean(dim=(0, 2))  # [H, D]; rotary keeps the sum of each pair
        moments = square.reshape(len(self.layout.key.starts), self.heads.group, -1).sum(1)
        inputs = root(second_moments(with_one(given[0])))
        return result, Metric(inputs, root(averaged[0] / len(square)), moments, self.output_roots())

    def output_roots(self) -> torch.Tensor | None:
        """[N, E, E], see `Metric`; None where the output projection is not known."""
        if not mappable(self.layout)[1]:
            return None
        return torch.stack([root(self.heads.output_gram(head)).T for head in range(len(self.layout.key.starts))])

    def pooled(self, metric: Metric, kv_heads: int, grouping: str) -> Pooled:
        """Keys and values of the new heads."""
        groups = similar(self.heads, kv_heads, metric) if grouping == "similarity" else \
            contiguous(len(self.layout.key.starts), kv_heads)
        return pool(self.heads, groups, "calibrated", metric=metric)

    def converted(self, module: torch.nn.Module, pooled: Pooled, run: Callable[[torch.nn.Module], Any],
                  wanted: torch.Tensor) -> tuple[Any, Pooled]:
        """Run the converted layer (`module`, of the target's shapes) on the second copy, its output projection fitted
        so that the answer is nearest to `wanted` [B, S, out]."""
        fill(module, self.module, self.layout.path, assemble(self.heads, self.target, pooled))
        if self.target.output is None:
            with recording(Attend(self.visible)):
                return run(module), pooled
        name = inner(self.target.output, self.layout.path)
        with inputs_of(module, name) as given, recording(Attend(self.visible)):
            run(module)
        projection: Any = module.get_submodule(name)
        features = given[0].reshape(-1, given[0].shape[-1]).float()
        goal = wanted.reshape(-1, wanted.shape[-1]).float()
        if getattr(projection, "bias", None) is not None:
            goal = goal - projection.bias.float()
        stored = projection.weight.double()
        before = stored.T if self.target.output.transposed else stored
        gram, cross = (features.T @ features).double(), (features.T @ goal).double()
        weight = RIDGE * gram.diagonal().mean()
        eye = torch.eye(len(gram), dtype=gram.dtype)
        fitted = torch.linalg.solve(gram + weight * eye, cross + weight * before.T).T
        at = torch.cat([torch.arange(start, start + self.target.output.size) for start in self.target.output.starts])
        pooled = Pooled(pooled.groups, pooled.key, pooled.value, pooled.key_maps, pooled.value_maps, fitted[:, at])
        fill(module, self.module, self.layout.path, assemble(self.heads, self.target, pooled))
        with recording(Attend(self.visible)):
            return run(module), pooled

    def errors(self, pooled: Pooled, wanted: torch.Tensor, got: torch.Tensor) -> LayerError:
        """Keys and values from weights, the output from the two answers."""
        rows = weight_errors(self.heads, pooled)
        away, size = (got - wanted).double().norm(), wanted.double().norm()
        return LayerError(rows.layer, rows.kv_heads, rows.key, rows.value, float(away / size.clamp_min(1e-300)),
                          "activations")


def fill(module: torch.nn.Module, source: torch.nn.Module, path: str, tensors: dict[str, torch.Tensor]) -> None:
    """Give a module its weights: those converted, and for the rest the source module's."""
    ours = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            made = tensors.get(f"{path}.{name}")
            parameter.copy_(made if made is not None else ours[name])


def empty_like(module: torch.nn.Module, source: torch.nn.Module) -> torch.nn.Module:
    """A copy of a skeleton's attention module with memory on the CPU, buffers as in the source's module."""
    made = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    buffers = dict(source.named_buffers())
    for name, buffer in made.named_buffers():
        buffer.copy_(buffers[name])
    return made
