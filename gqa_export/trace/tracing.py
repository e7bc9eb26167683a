"""Module -> canonical ONNX: the attention interface, the mask probe, export, stamping. No ORT, no TensorRT here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..spec import ModelSpec
from .traced import Traced

if TYPE_CHECKING:
    pass


def trace(config: Any, *, dtype: str, cache: str, capacity: int, logits: str = "all", interface: str = "mask",
          stamping: bool = True, inspect: Callable[[Any], None] | None = None,
          accept: Callable[[ModelSpec], None] | None = None, hidden: bool = False) -> Traced:
    """Trace a transformers config into the canonical ONNX model; weights appear by name only.

    The form of the graph is described in `capture.canonical`.

    Args:
        config: a transformers configuration.
        dtype: "float32", "float16" or "bfloat16".
        cache: "growing" or "static".
        capacity: tokens that the cache shall hold; beyond the original length of `longrope` both its tables are in
            the graph.
        logits: "all" or "last".
        interface: "mask" (attention_mask is an input) or "lengths" (past_lengths and new_lengths are).
        stamping: trace two layers of each kind and repeat them, where that can be proved; False traces all layers.
        inspect: called with the weightless module before anything is traced, to refuse it.
        accept: called with the facts of its layers, likewise.
        hidden: the last hidden states are an output too.

    Raises:
        UnsupportedModel: a layer, a mask, a rotary type or an argument of attention cannot be represented, or the
            model cannot be traced.
    """
    from .patches import registry

    with registry.applied(config):
        return _trace(config, dtype=dtype, cache=cache, capacity=capacity, logits=logits, interface=interface,
                      stamping=stamping, inspect=inspect, accept=accept, hidden=hidden)


def _trace(config: Any, *, dtype: str, cache: str, capacity: int, logits: str, interface: str, stamping: bool,
           inspect: Callable[[Any], None] | None, accept: Callable[[ModelSpec], None] | None,
           hidden: bool) -> Traced:
    import torch

    from . import attention_hook, skeleton
    from .capture import canonical, decoder_module, export, simplify
    from .probe import rotary
    from .probe.layer_probe import probe_layers, refuse_mixing
    from .stamping import layer_kinds, stamp

    name, torch_dtype = attention_hook.register(), getattr(torch, dtype)
    rotary.check_rope(config.get_text_config())
    meta_model = skeleton.build(config, torch_dtype, device="meta", attention=name)
    if inspect:
        inspect(meta_model)
    regime = rotary.settle(meta_model, capacity)
    probed = probe_layers(config, meta_model, capacity)
    spec = replace(probed.spec, rope_switch=regime.switch)
    if accept:
        accept(spec)
    stack, prints, whole_because = None, (), "stamping is off"
    if stamping:
        try:
            stack, prints = layer_kinds.plan(meta_model, probed)
            whole_because = ""
        except layer_kinds.NotAlike as reason:
            stack, whole_because = None, str(reason)
    del meta_model
    while True:
        short = layer_kinds.shorten(config, max(stack.traced) + 1) if stack else config
        model = skeleton.build(short, torch_dtype, attention=name)
        rotary.settle(model, capacity)
        if stack:
            layer_kinds.keep_layers(model, stack)
            if layer_kinds.prints(model, stack) != prints:
                stack, whole_because = None, "something in the model is computed from the number of layers"
                continue
        part = replace(spec, layers=tuple(layer for layer in spec.layers if layer.layer in stack.traced),
                       states=tuple(state for state in spec.states if state.layer in stack.traced)) if stack else spec
        decoder = decoder_module.Decoder(model, part, cache=cache, logits=logits, interface=interface,
                                         hidden=hidden)
        program, slow_because = export.export_decoder(decoder, part, torch_dtype, capacity)
        names = {f"model.{key}" for key in model.state_dict(keep_vars=True)}
        weights = simplify.detach_weights(program, names.__contains__)
        simplify.simplify(program)
        canonical.plain_reshapes(program)
        canonical.read_sizes_from_the_first(program)
        if stack is None:
            break
        try:
            stamp.stamp(program, stack, "model.")
            weights = [value for value in program.graph.inputs if (value.name or "").startswith("model.")]
            break
        except stamp.NotIsomorphic as reason:
            stack, whole_because = None, f"the layers differ: {reason}"
    canonical.name_nodes(program)
    simplify.merge_common(program)
    proto = canonical.to_proto(program, weights, spec, cache=cache, logits=logits, interface=interface,
                               prefix="model.", hidden=hidden)
    refuse_mixing(proto)
    return Traced(proto, spec, len(stack.traced) if stack else spec.depth, whole_because, regime.name,
                  skeleton.tied(model), skeleton.converts(model), capacity, slow_because)
