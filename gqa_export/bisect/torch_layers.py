"""What PyTorch computes inside each decoder layer: inputs, the output of every module, the arguments of attention.

One row at a time, unpadded, in the reference's number format. Dimensions as in `gqa_export.attention_op`; a point is
[S, W], whatever heads it has flattened into W.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..checkpoint.decoder_layers import layer_lists
from ..errors import GqaExportError


@dataclass
class Attended:
    """One call of attention: query [H, S, D], key [K, T, D] and value [K, T, E] rotated, the additive mask [S, T],
    scale, softcap (0 none), sinks [H] or None, output [S, H, E]."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    mask: np.ndarray | None
    scale: float
    softcap: float
    sinks: np.ndarray | None


@dataclass
class LayerReference:
    """A layer: hidden states in and out [S, hidden], points by name in the order of computation, weights of its
    linear modules by the same names ([out, in], bias or None), its attention."""

    hidden: np.ndarray
    points: dict[str, np.ndarray] = field(default_factory=dict)
    weights: dict[str, tuple[np.ndarray, np.ndarray | None]] = field(default_factory=dict)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    attended: Attended | None = None
    output: np.ndarray = field(default_factory=lambda: np.zeros(0))


@dataclass
class RowReference:
    """A row: its layers, what the model's end is fed with and gives, and the cache after it, per layer [K, T, D]."""

    layers: list[LayerReference]
    logits: np.ndarray
    cache: list[tuple[np.ndarray, np.ndarray]]


def layer_list(model: Any, count: int) -> tuple[str, Any]:
    """Name and ModuleList of the decoder's layers. Raises GqaExportError where there is none of that length."""
    for found in layer_lists(model, count):
        return found
    raise GqaExportError(f"bisect looks into a list of {count} layers, which this model does not have",
                         type(model).__name__, "use `gqa-export validate`, which compares the outputs",
                         code="E-VALIDATE-BISECT-LAYERS")


def watch_row(session: Any, layers: Any, past: np.ndarray, new: np.ndarray) -> RowReference:
    """Feed `past` (ids [P], may be empty), then `new` (ids [S]) to the reference's session; record the second step."""
    session.reset(1)
    if len(past):
        session.step(past[None])
    found = [LayerReference(np.zeros(0)) for _ in layers]
    with _hooks(layers, found), _attention(layers, found):
        step = session.step(new[None])
    cache = [(key[0], value[0]) for key, value in session.cache()]
    for number, layer in enumerate(found):
        layer.points = _with_cache(layer.points, cache[number], len(past)) if number < len(cache) else layer.points
    return RowReference(found, step.logits[0], cache)


def _with_cache(points: dict[str, np.ndarray], pair: tuple[np.ndarray, np.ndarray], past: int) -> dict[str, np.ndarray]:
    """The points with the layer's whole present put before its attention."""
    ordered: dict[str, np.ndarray] = {}
    for name, values in points.items():
        if name.endswith(".attention"):
            stem = name.rpartition(".")[0]
            for kind, array in zip(("key", "value"), pair):
                ordered[f"{stem}.{kind}"] = array
        ordered[name] = values
    return ordered


@contextmanager
def _hooks(layers: Any, found: list[LayerReference]) -> Iterator[None]:
    handles = []
    for number, layer in enumerate(layers):
        record = found[number]

        def enter(_: Any, args: Any, kwargs: Any, record: LayerReference = record) -> None:
            record.hidden = _flat(args[0] if args else kwargs["hidden_states"])

        def leave(_: Any, __: Any, result: Any, record: LayerReference = record) -> None:
            record.output = _flat(_first(result))

        handles += [layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave)]
        attention = _attention_name(layer)
        for name, module in layer.named_modules():
            if name:
                handles.append(module.register_forward_hook(_point(record, name, attention)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _point(record: LayerReference, name: str, attention: str) -> Any:
    def hook(module: Any, args: Any, result: Any) -> None:
        output = _first(result)
        if not isinstance(output, torch.Tensor) or output.ndim < 3:
            return
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2 and args:
            transposed = weight.shape[0] != output.shape[-1]  # Conv1D of GPT-2 stores [in, out]
            values = weight.detach().double().numpy()
            bias = getattr(module, "bias", None)
            record.weights[name] = (values.T if transposed else values,
                                    None if bias is None else bias.detach().double().numpy())
            record.inputs[name] = _flat(args[0])
            if name.startswith(f"{attention}.") and record.attended is not None:
                record.points[f"{attention}.attention"] = _flat(args[0])
        record.points[name] = _flat(output)
    return hook


def _attention_name(layer: Any) -> str:
    """The name within a layer of the module that attends."""
    return next((name for name, module in layer.named_modules() if name and hasattr(module, "layer_idx")
                 and any(True for _ in module.children())), "self_attn")


@contextmanager
def _attention(layers: Any, found: list[LayerReference]) -> Iterator[None]:
    """Inside, the eager attention of the layers' own modules notes what it is called with."""
    owners: dict[int, LayerReference] = {}
    files = set()
    for number, layer in enumerate(layers):
        for module in layer.modules():
            owners[id(module)] = found[number]
            files.add(type(module).__module__)
    patched = [(sys.modules[name], sys.modules[name].eager_attention_forward) for name in sorted(files)
               if hasattr(sys.modules.get(name), "eager_attention_forward")]

    def noted(original: Any) -> Any:
        def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any,
                   *args: Any, **kwargs: Any) -> Any:
            record = owners.get(id(module))
            if record is not None:
                sinks = kwargs.get("s_aux", getattr(module, "sinks", None))
                scaling = kwargs.get("scaling")
                scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
                rotated = [tensor[0].detach().double().numpy() for tensor in (query, key, value)]
                record.attended = Attended(
                    rotated[0], rotated[1], rotated[2],
                    None if attention_mask is None else attention_mask[0, 0].detach().double().numpy(), scale,
                    float(kwargs.get("softcap") or 0.0), None if sinks is None else sinks.detach().double().numpy())
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        return attend

    try:
        for file, original in patched:
            file.eager_attention_forward = noted(original)  # type: ignore[attr-defined]
        yield
    finally:
        for file, original in patched:
            file.eager_attention_forward = original  # type: ignore[attr-defined]


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def _flat(tensor: torch.Tensor) -> np.ndarray:
    """[1, S, ...] or [1, H, S, D] as it lies -> fp64 [S, W]; heads-first tensors are left [H, S, D]."""
    values = tensor.detach().double().numpy()[0]
    return values.reshape(values.shape[0], -1) if values.ndim <= 2 else values
