"""How much a model's predictions depend on each output of each matrix: from one pass backward over some tokens.

A small error e of a matrix's output moves a prediction by the KL divergence `(g e)^2 / 2`, with g the gradient of the
logarithm of the probability of a token that the model itself draws (the Fisher information). Errors of rounding are
about independent from row to row, so that `sum over n of mean(g_n^2) * mean(e_n^2) / 2` is what a matrix adds.

What a layer computes on the way is not kept for the way back, but computed again there, a layer at a time: of SmolLM2's
30 layers it would be 270 MB, and computing it again costs a third of the time.
"""

from __future__ import annotations

import gc
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.autograd.graph import get_gradient_edge

from ..checkpoint.decoder_layers import layer_lists
from ..checkpoint.load_model import load_model
from ..environment.heap import give_back
from ..environment.machine import small_blocks_apart
from ..progress import Progress
from ..trace.skeleton import has_experts

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

Array = Any
"""a numpy array"""
LENGTH = 128
"""tokens of each row: what a pass keeps for the way back is that of so many"""
PIECE = 16
"""tokens whose gradients are squared at once"""
SEED = 0


def sensitivities(checkpoint: Checkpoint, rows: torch.Tensor, names: Collection[str],
                  importance: dict[str, Array], report: Progress) -> dict[str, Array]:
    """What a squared error of each output counts, in nats.

    Args:
        checkpoint: of the model; it runs in its own number format.
        rows: int64 `[rows, length]`, tokens; the first 128 of each row are used.
        names: of the parameters.
        importance: name -> `[K]`, mean square of each column of the input, as errors are weighed by it.
        report: called with the rows done.

    Returns:
        Name -> float64 `[N]`. Empty where a gradient is not finite.
    """
    gc.collect()  # an export does not collect by itself, and this is where it needs most
    give_back()
    model: Any = load_model(checkpoint, "auto")
    if has_experts(model):
        model.set_experts_implementation("eager")  # an expert at a time: others copy a matrix for each token
    sums: dict[str, torch.Tensor] = {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    model.requires_grad_(False)
    _compute_again(model)
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if name in names and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(_of_outputs(sums, name))
    shared = [name for name, parameter in model.named_parameters(remove_duplicate=False) if name in names]
    heads = [name for name in shared if head is not None and model.get_parameter(name) is head.weight]
    for name in heads:
        if model.get_submodule(name.rpartition(".")[0]) is not head:  # tied: the graph names it by the embedding
            head.register_forward_hook(_of_outputs(sums, name))
    embedding.register_forward_hook(lambda _, __, found: found.requires_grad_())
    of_embedding: dict[str, torch.Tensor] = {}
    embedding.register_forward_hook(_of_outputs(of_embedding, ""))
    random = torch.Generator().manual_seed(SEED)
    pieces, count = rows[:, :LENGTH], 0
    with small_blocks_apart():  # what a layer computes is of that size, and there are many beside what is kept
        for place, row in enumerate(pieces):
            report("measuring what predictions depend on", place, len(pieces))
            _way_back(model, row, random)
            count += len(row)
    found = {name: (total / (2 * count)).numpy() for name, total in sums.items()}
    for name in shared:
        parameter = model.get_parameter(name)
        if parameter is not embedding.weight:
            continue
        # a lookup reads one row for each token: an error of any row counts as one of a token in so many
        columns = float(importance[name].mean()) if name in importance else 1.0
        each = float((of_embedding[""] / (2 * count)).mean()) / columns / parameter.shape[0]
        found[name] = found.get(name, np.zeros(parameter.shape[0])) + each
    del model, embedding, head, module, parameter
    gc.collect()
    give_back()
    return found if all(np.isfinite(each).all() for each in found.values()) else {}


def _way_back(model: Any, row: torch.Tensor, random: torch.Generator) -> None:
    """One pass forward and backward: what the logarithms of the probabilities of tokens depend on that the model draws.
    Of all that has the size of the logits, no more than two are there at a time."""
    logits = model(input_ids=row[None], use_cache=False).logits[0].float()
    edge, gradient = get_gradient_edge(logits), logits.detach().log_softmax(-1)
    del logits
    drawn = torch.multinomial(gradient.exp_(), 1, generator=random)
    gradient.neg_().scatter_add_(1, drawn, torch.ones_like(drawn, dtype=gradient.dtype))
    torch.autograd.backward((edge,), (gradient,))


def _compute_again(model: Any) -> None:
    """Let each decoder layer forget what it computed until its gradients need it; a model whose layers are not found
    keeps all."""
    from torch.utils.checkpoint import checkpoint

    config = model.config.get_text_config()
    _, layers = next(layer_lists(model, getattr(config, "num_hidden_layers", 0)), ("", ()))
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def _of_outputs(sums: dict[str, torch.Tensor], name: str) -> Any:
    """A hook of a module that adds up squared gradients of its output."""
    def add(gradient: torch.Tensor) -> None:
        for piece in gradient.reshape(-1, gradient.shape[-1]).split(PIECE):  # a head's is the largest tensor there is
            square = piece.double().square().sum(0)
            sums[name] = sums[name] + square if name in sums else square

    def hook(_: Any, __: Any, found: torch.Tensor) -> None:
        if found.requires_grad:
            found.register_hook(add)

    return hook
