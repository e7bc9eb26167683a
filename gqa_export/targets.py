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

    Attributes:
        name: as in `--target`.
        attention: the op that a layer becomes.
        fallback: what a layer becomes that `attention` cannot hold; "" if the export is refused then.
        opset, ir_version: of the model; where `lowest_opset`, at most.
        caches: "growing", "static" or both, the default first.
        interface: "mask" (attention_mask) or "lengths" (past_lengths, new_lengths).
        logits: "all", "last" or both, the default first.
        dtypes: per execution provider, the types that its kernels take; a provider that is not listed cannot run
            this target.
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
    chunks: bool = False
    """attention in chunks of positions"""
    softcap: bool = True
    sinks: bool = True
    value_head_size_differs: bool = True
    head_size_multiple: int = 1
    head_size_most: int = 0
    """0 is no limit"""
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
    ragged_chunks_need: str = ""
    """first version of the runtime whose attention op takes each row's number of new tokens, so that `chunks_alone` and
    `empty_alone` do not hold for a graph that gives it; "" where there is none, or no need of one"""
    shared_caches_need: str = ""
    """first version of the runtime whose attention op reads a cache without adding to it, so that a layer without a
    cache reads another's; "" where none is needed"""
    whole_row_masks: bool = False
    """a mask may have all ones of a row first, as onnxruntime-genai's Engine sends it, and not only the past first and
    the new tokens first in the last columns; a row without new tokens cannot be told then"""
    genai: bool = False
    """bundles carry a genai_config.json and load in onnxruntime-genai"""
    packed_projections: bool = False
    """query, key and value may be one matrix product"""
    lowest_opset: bool = False
    """the model declares the lowest version of the standard ops at which it means the same, so that older runtimes take
    it (`gqa_export.lowering.opset`)"""
    function: bool = False
    """the model carries the op as a model-local function"""
    state_ops: Mapping[str, str] = field(default_factory=dict)
    """state op -> the operator that it becomes where the runtime has it; the others become standard operators"""
    state_ops_since_first: tuple[str, ...] = ()
    """those of `state_ops` that every version of the runtime has which this package takes"""
    nbits: bool = False
    """quantized weights are held by MatMulNBits and GatherBlockQuantized; otherwise by DequantizeLinear"""
    zero_points: bool = True
    """DequantizeLinear takes zero points that are not 0"""
    float_codes: tuple[str, ...] = ()
    """kinds of codes (`QuantizedMatrix.kind`) that are numbers of float8 or float4, and that DequantizeLinear takes"""
    input_codes: tuple[str, ...] = ()
    """those to which the inputs of products with such a weight may be rounded as well (`--activations same`)"""
    positive_scales: bool = False
    """DequantizeLinear takes codes of eight bits, and of float8 and float4, with scales above 0 alone (so TensorRT's
    parser; with 4-bit integers it takes any)"""
    quantized_blocks: tuple[int, ...] = ()
    """columns that may share a scale in DequantizeLinear; () is any number"""
    long_inside: bool = False
    """`attention` itself approximates long prompts, by attributes; otherwise another op stands in its place"""
    long_missing: str = ""
    """why no graph for long prompts, with approximate attention, is written beside the exact one; "" if it can be"""
    states_missing: str = ""
    """why the target cannot hold layers that keep a state of fixed size; "" if it can"""
    windows_missing: str = ""
    """why windowed layers cannot keep a ring of window + chunk slots in place of the capacity; "" if they can"""
    windows_instead: str = ""
    """why they keep the whole capacity where that was asked for; "" if they keep a ring"""
    kv_bits: tuple[int, ...] = ()
    """bits of the codes that a quantized cache may have"""
    kv_fp8: bool = False
    """a quantized cache may hold 8-bit floats too"""
    kv_missing: str = ""
    """why there are no others"""
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def cannot_hold(self, layer: AttentionSpec) -> list[str]:
        """Every reason why `attention` cannot hold a layer; empty if it can."""
        op, largest = self.attention, max(layer.head_size, layer.value_head_size)
        conditions = (
            (layer.window and not self.window, f"{op} has no window and this layer sees {layer.window} tokens"),
            (layer.chunk and not self.chunks,
             f"{op} has no attention in chunks and this layer sees only its own {layer.chunk} positions"),
            (layer.softcap and not self.softcap,
             f"{op} cannot be relied on to cap scores, and this layer caps them at {layer.softcap:g}"),
            (layer.sinks and not self.sinks, f"{op} has no attention sinks"),
            (layer.value_head_size != layer.head_size and not self.value_head_size_differs,
             f"{op} takes one head size, this layer's keys have {layer.head_size} and its values "
             f"{layer.value_head_size}"),
            (layer.head_size % self.head_size_multiple,
             f"{op} takes head sizes divisible by {self.head_size_multiple}, not {layer.head_size}"),
            (self.head_size_most and largest > self.head_size_most,
             f"{op} takes head sizes up to {self.head_size_most}, not {largest}"))
        return [reason for failed, reason in conditions if failed]

    def writes_in_place(self, fallbacks: Iterable[Fallback]) -> bool:
        """Whether past and present may be the same memory in a graph with these fallbacks: if every layer got the
        target's own attention, which writes only the new tokens."""
        return self.shares_buffer and not any(fallback.wanted == self.attention for fallback in fallbacks)

    def rotates(self, head_size: int, rotary_size: int) -> bool:
        """Whether the attention op itself can rotate heads of this size."""
        return (self.rotary_inside and head_size % self.rotary_head_multiple == 0
                and rotary_size % 2 == 0 and (rotary_size // 2) % self.rotary_half_multiple == 0)


_NO_STATES = ("TensorRT has no operator for them; TensorRT-RTX reads LinearAttention and CausalConvWithState as "
              "plugins of a library that needs NVIDIA's driver to be loaded, so that nothing is known of its results")

_NO_FUNCTION = "the standard operator Attention reads every key, and the target is for graphs of it alone"
_INT8_ALONE = ("its graph updates the cache with Concat, GatherND and TensorScatter, for which ONNX Runtime's CPU "
               "provider has kernels of int8, but neither of int4 nor of 8-bit floats")

_NO_RING = "the standard operators' graph takes a token's place in the cache for its position"

_ROWS = (
    Target(name="ort", dialect="ort.passes", attention="com.microsoft::GroupQueryAttention",
           fallback="gqa::GroupedQueryAttention", opset=23, ir_version=10, caches=("growing", "static"),
           interface="mask", value_head_size_differs=False, head_size_multiple=8, shares_buffer=True, chunks_alone=True,
           empty_alone=True, ragged_chunks_need="1.32", shared_caches_need="1.31",
           rotary_inside=True, rotary_head_multiple=16, rotary_half_multiple=8, packed_projections=True, genai=True,
           state_ops=MappingProxyType({"LinearAttention": "com.microsoft::LinearAttention",
                                       "CausalConv": "com.microsoft::CausalConvWithState"}),
           state_ops_since_first=("com.microsoft::LinearAttention", "com.microsoft::CausalConvWithState"),
           whole_row_masks=True, lowest_opset=True, nbits=True, kv_bits=(8, 4),
           windows_instead="GroupQueryAttention's own cache of a window (sliding_window_cache, ONNX Runtime 1.32) "
           "keeps tokens in an order of its own, which is not written yet",
           kv_missing="GroupQueryAttention's CPU kernel takes caches of int8 and int4 codes",
           dtypes=MappingProxyType({"cpu": ("float32", "float16"), "cuda": ("float16", "bfloat16")})),
    Target(name="onnx", dialect="onnx.passes", attention="Attention", fallback="gqa::GroupedQueryAttention",
           opset=23, ir_version=10, caches=("growing", "static"), interface="mask", chunks=True, softcap=False,
           sinks=False,
           # softcap: until 2026 the standard capped after the mask, which leaks masked tokens (onnx/onnx#7865, mended
           # in place by #7867); what a runtime does depends on its age
           nan_tail_safe=False, shares_buffer=True, lowest_opset=True, long_missing=_NO_FUNCTION,
           kv_bits=(8,), kv_missing=_INT8_ALONE, windows_missing=_NO_RING,
           state_ops=MappingProxyType({"LinearAttention": "ai.onnx::LinearAttention"}),
           dtypes=MappingProxyType({"cpu": ("float32", "float16"), "cuda": FLOATS})),
    Target(name="portable", dialect="portable", attention="gqa::GroupedQueryAttention", fallback="",
           opset=23, ir_version=10, caches=("growing", "static"), interface="mask", function=True, chunks=True,
           lowest_opset=True, kv_bits=(8,), kv_missing=_INT8_ALONE,
           dtypes=MappingProxyType({"cpu": ("float32", "float16"), "cuda": FLOATS})),
    Target(name="trt-plugin", dialect="tensorrt.plugin", attention="gqa::GroupedQueryAttention", fallback="",
           opset=23, ir_version=10, caches=("static",), interface="lengths", logits=("last",), engine=True,
           rotary_inside=True, head_size_most=256, literal_capacity=True, runs_in_onnxruntime=False, shares_buffer=True,
           writes_padding=False, states_missing=_NO_STATES, zero_points=False,
           float_codes=("e4m3", "e2m1"), input_codes=("e4m3", "e2m1"), positive_scales=True,
           quantized_blocks=(16, 32, 64, 128), long_inside=True,
           kv_bits=(8,), kv_fp8=True, kv_missing="the plugin's kernels read and write one code a byte",
           dtypes=MappingProxyType({"tensorrt": FLOATS})),
    Target(name="trt-native", dialect="tensorrt.native", attention="Attention", fallback="",
           opset=24, ir_version=10, caches=("static",), interface="lengths", logits=("last",), engine=True,
           softcap=False, sinks=False, value_head_size_differs=False, nan_tail_safe=False, shares_buffer=True,
           literal_capacity=True, runs_in_onnxruntime=False, states_missing=_NO_STATES, zero_points=False,
           float_codes=("e4m3", "e2m1"), input_codes=("e4m3", "e2m1"), positive_scales=True,
           quantized_blocks=(16, 32, 64, 128), long_missing=_NO_FUNCTION, windows_missing=_NO_RING,
           kv_missing="TensorRT's own cache update takes floating-point tensors only, so that codes need trt-plugin",
           dtypes=MappingProxyType({"tensorrt": FLOATS})),
)

CPU = MappingProxyType({"cpu": ("float32",)})

TARGETS: dict[str, Target] = {row.name: row for row in _ROWS}


def layers_label(numbers: Iterable[int]) -> str:
    """Layer numbers in words: "layer 3", "layers 0-2, 5"."""
    ordered = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"layer{'s' if len(ordered) > 1 else ''} {', '.join(parts)}"


def by_reason(found: Iterable[tuple[int, str]]) -> list[str]:
    """One line for each different reason, in the order in which they appear, with the layers that it concerns.
    found: a layer's number and a reason."""
    layers: dict[str, list[int]] = {}
    for number, reason in found:
        layers.setdefault(reason, []).append(number)
    return [f"{layers_label(numbers)}: {reason}" for reason, numbers in layers.items()]


def reasons_against(layers: Iterable[AttentionSpec], target: Target) -> list[str]:
    """Every reason why the attention op of `target` cannot hold a model's layers, with the layers it concerns."""
    return by_reason((layer.layer, reason) for layer in layers for reason in target.cannot_hold(layer))


def on_cpu(target: Target) -> Target:
    """The row by which the graph of an engine target is run in ONNX Runtime: in fp32, plugin nodes interpreted."""
    return replace(target, runs_in_onnxruntime=True, shares_buffer=False, dtypes=CPU)


def get_target(name: str) -> Target:
    """The row of a target.

    Raises:
        GqaExportError: there is none of this name; the names are listed.
    """
    if name not in TARGETS:
        raise GqaExportError(f"unknown target {name!r}", "--target", f"use one of {', '.join(TARGETS)}",
                             code="E-TARGET-NAME")
    return TARGETS[name]
