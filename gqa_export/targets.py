"""Every fact about every target, one frozen row each. Code asks `target.softcap`, never for a target's name.

Sources: onnxruntime docs/ContribOperators.md, onnx docs/Operators.md (Attention-23/24), and runs of ONNX Runtime 1.31
and TensorRT-RTX 1.7 (a refusal noted here was met, not read).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from .errors import GqaExportError
from .spec import DTYPES, AttentionSpec, Fallback

FLOATS = tuple(DTYPES.values())


@dataclass(frozen=True)
class Target:
    """What a target's graph looks like and what its attention op can hold.

    interface: "mask" (attention_mask) or "lengths" (past_lengths, new_lengths). attention: the op a layer becomes;
    fallback: what a layer becomes that it cannot hold, "" if then the export is refused. dtypes: per execution
    provider, what its kernels take; a provider that is not there cannot run this target.
    """

    name: str
    dialect: str
    """the module of `gqa_export.lowering` that has its passes"""
    attention: str
    fallback: str
    opset: int
    ir_version: int
    caches: tuple[str, ...]
    interface: str
    logits: tuple[str, ...] = ("all", "last")
    window: bool = True
    softcap: bool = True
    sinks: bool = True
    value_head_size_differs: bool = True
    head_size_multiple: int = 1
    head_size_most: int = 0
    """0 is no limit"""
    shared_cache_layers: bool = False
    """a layer may read another layer's present and write nothing"""
    runs_in_onnxruntime: bool = True
    """a session of ONNX Runtime is what its bundles are for"""
    engine: bool = False
    """its graphs are made into TensorRT engines; on a CPU the graph alone can be checked, by `on_cpu`"""
    literal_capacity: bool = False
    """the capacity of a static cache is a number in the graph's shapes (TensorRT's cache update asks for that)"""
    shares_buffer: bool = False
    """with a static cache, past and present may be the same memory"""
    writes_padding: bool = True
    """padded tokens are written into a static cache too, so they must not reach past its end"""
    chunks_alone: bool = False
    """several new tokens over a past only at batch 1"""
    empty_alone: bool = False
    """no sequence of a batch may bring zero new tokens"""
    nan_tail_safe: bool = True
    """what lies beyond the lengths may be NaN"""
    rotary_inside: bool = False
    rotary_head_multiple: int = 1
    """rotary inside the op only if D is a multiple of this"""
    rotary_half_multiple: int = 1
    """rotary inside the op only if R/2 is a multiple of this"""
    genai: bool = False
    """bundles carry a genai_config.json and load in onnxruntime-genai"""
    packed_projections: bool = False
    """query, key and value may be one matrix product"""
    function: bool = False
    """the model carries the op as a model-local function"""
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def cannot_hold(self, layer: AttentionSpec) -> str:
        """Why `attention` cannot hold a layer; "" if it can."""
        if layer.window and not self.window:
            return f"{self.attention} has no window and this layer sees {layer.window} tokens"
        if layer.softcap and not self.softcap:
            return f"{self.attention} cannot be relied on to cap scores, and this layer caps them at {layer.softcap:g}"
        if layer.sinks and not self.sinks:
            return f"{self.attention} has no attention sinks"
        if layer.value_head_size != layer.head_size and not self.value_head_size_differs:
            return (f"{self.attention} wants one head size, this layer's keys have {layer.head_size} "
                    f"and its values {layer.value_head_size}")
        if layer.head_size % self.head_size_multiple:
            return f"{self.attention} wants a head size divisible by {self.head_size_multiple}, not {layer.head_size}"
        if self.head_size_most and max(layer.head_size, layer.value_head_size) > self.head_size_most:
            return (f"{self.attention} takes head sizes up to {self.head_size_most}, not "
                    f"{max(layer.head_size, layer.value_head_size)}")
        return ""

    def writes_in_place(self, fallbacks: Iterable[Fallback]) -> bool:
        """Whether past and present may be the same memory in a graph with these fallbacks: if every layer got the
        target's own attention, which writes only the new tokens."""
        return self.shares_buffer and not any(fallback.wanted == self.attention for fallback in fallbacks)

    def rotates(self, head_size: int, rotary_size: int) -> bool:
        """Whether the attention op itself can rotate heads of this size."""
        return (self.rotary_inside and head_size % self.rotary_head_multiple == 0
                and rotary_size % 2 == 0 and (rotary_size // 2) % self.rotary_half_multiple == 0)


_ROWS = (
    Target(name="ort", dialect="ort.passes", attention="com.microsoft::GroupQueryAttention",
           fallback="gqa::GroupedQueryAttention", opset=23, ir_version=10, caches=("growing", "static"),
           interface="mask", value_head_size_differs=False, head_size_multiple=8, shares_buffer=True, chunks_alone=True,
           empty_alone=True,
           rotary_inside=True, rotary_head_multiple=16, rotary_half_multiple=8, packed_projections=True, genai=True,
           dtypes=MappingProxyType({"cpu": ("float32", "float16"), "cuda": ("float16", "bfloat16")})),
    Target(name="onnx", dialect="onnx.passes", attention="Attention", fallback="gqa::GroupedQueryAttention",
           opset=23, ir_version=10, caches=("growing", "static"), interface="mask", softcap=False, sinks=False,
           # softcap: until 2026 the standard capped after the mask, which leaks masked tokens (onnx/onnx#7865, mended
           # in place by #7867); what a runtime does depends on its age
           nan_tail_safe=False, shares_buffer=True,
           dtypes=MappingProxyType({"cpu": ("float32", "float16"), "cuda": FLOATS})),
    Target(name="portable", dialect="portable", attention="gqa::GroupedQueryAttention", fallback="",
           opset=23, ir_version=10, caches=("growing", "static"), interface="mask", function=True,
           dtypes=MappingProxyType({"cpu": ("float32", "float16"), "cuda": FLOATS})),
    Target(name="trt-plugin", dialect="tensorrt.plugin", attention="gqa::GroupedQueryAttention", fallback="",
           opset=23, ir_version=10, caches=("static",), interface="lengths", logits=("last",), engine=True,
           rotary_inside=True, head_size_most=256, literal_capacity=True, runs_in_onnxruntime=False, shares_buffer=True,
           writes_padding=False, dtypes=MappingProxyType({"tensorrt": FLOATS})),
    Target(name="trt-native", dialect="tensorrt.native", attention="Attention", fallback="",
           opset=24, ir_version=10, caches=("static",), interface="lengths", logits=("last",), engine=True,
           softcap=False, sinks=False, value_head_size_differs=False, nan_tail_safe=False, shares_buffer=True,
           literal_capacity=True, runs_in_onnxruntime=False,
           dtypes=MappingProxyType({"tensorrt": FLOATS})),
)

CPU = MappingProxyType({"cpu": ("float32",)})

TARGETS: dict[str, Target] = {row.name: row for row in _ROWS}


def refuse_layers(layers: Iterable[AttentionSpec], target: Target) -> None:
    """Raise GqaExportError for the first layer that `target` can hold in no way, naming a target that can."""
    layers = list(layers)
    for layer in layers:
        reason = "" if target.fallback else target.cannot_hold(layer)
        if reason:
            others = [row.name for row in TARGETS.values() if row.interface == target.interface
                      and not any(row.cannot_hold(each) for each in layers)]
            raise GqaExportError(reason, f"layer {layer.layer}, target {target.name}",
                                 f"use --target {' or '.join(others)}" if others else
                                 "use --target ort and ONNX Runtime: no target for TensorRT can hold this model")


def on_cpu(target: Target) -> Target:
    """The row by which the graph of an engine target is run in ONNX Runtime: in fp32, plugin nodes interpreted."""
    return replace(target, runs_in_onnxruntime=True, shares_buffer=False, dtypes=CPU)


def get_target(name: str) -> Target:
    """The row of a target, or a GqaExportError that lists them."""
    if name not in TARGETS:
        raise GqaExportError(f"unknown target {name!r}", "--target", f"one of {', '.join(TARGETS)}")
    return TARGETS[name]
