"""What one plugin layer launches, as numbers: kernels, grids, arguments, workspace. No GPU, torch, Triton or TensorRT.

Python's plugin and the C++ one follow this file. Dimensions as in `gqa_export.attention_op`; `group` is H / K.

Order of launches: append (if has_new or has_rotary), then decode and combine, or prefill, or, in a layer of version 2
with a method and S > exact_steps, score, select and long_prefill (`choose`, `long_launch`):

    rows = S * group
    prefill   if S > 1 and rows > 128
    decode    otherwise, by plan.choose_programs(B, K, ceil(rows / decode.tile_rows), keys, min(SMs, 256)) programs
              where keys = min(C, window + S - 1) if window else C

A ring (growing 2) has C slots, and takes C - window + 1 new tokens of a sequence at once; combine is told that number
in place of its capacity.

The bound on the cache is its capacity, never a length: a captured CUDA graph serves every length. Grids are those of
docs/kernels.md. Workspace, each part aligned to 256 bytes, in this order: rotated queries [B, S, H*D] T (has_rotary),
faults (where new tokens become codes, `append`), partial outputs, their log-sum-exp, and where each row's begin and end
(`decode`). The step of a cache's codes goes into the scale of the scores and into the output, so that registers only
convert.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from gqa_plugins.grouped_attention import long_launch, plan
from gqa_plugins.grouped_attention.cubin import Cubin, Variant
from gqa_plugins.grouped_attention.fields import CREATION_OF, PLUGIN_VERSION, REBUILD
from gqa_plugins.grouped_attention.limits import find_excess
from gqa_plugins.grouped_attention.workspace import (
    faults_bytes,
    long_bytes,
    long_shape,
    parts_bytes,
    rotated_bytes,
)

from gqa_export.attention_op import RING
from gqa_export.errors import InvalidBundle
from gqa_export.long_attention_op import LongSetting

SM_BOUND = 256  # more SMs than this are not filled by decode: the workspace is sized before the GPU is known
KINDS = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}


@dataclass(frozen=True)
class Layer:
    """The creation fields of one plugin layer; those of versions 2 and 3 are in `long_layer` and `coded_layer`."""

    version: ClassVar[str] = PLUGIN_VERSION
    num_heads: int
    kv_num_heads: int
    scale: float
    softcap: float
    window: int
    rotary_interleaved: int
    growing: int
    has_rotary: int
    has_sinks: int
    has_new: int

    @classmethod
    def from_fields(cls, values: Mapping[str, Any], where: str = "plugin fields") -> Layer:
        """From name -> number. Raises GqaExportError for a field that is missing, unknown or out of range."""
        kinds = dict(CREATION_OF[cls.version])
        odd = sorted(set(values).symmetric_difference(kinds))
        if odd:
            raise InvalidBundle(f"the attention layer lacks or does not know: {', '.join(odd)}", where,
                                "export the bundle again with this version: `gqa-export onnx --target trt-plugin`",
                                 code="E-ENGINE-LAYER-FIELDS")
        layer = cls(**{name: (float if kind == "float32" else int)(values[name]) for name, kind in kinds.items()})
        wrong = ""
        if layer.kv_num_heads < 1 or layer.num_heads < 1 or layer.num_heads % layer.kv_num_heads:
            wrong = f"{layer.num_heads} query heads cannot be grouped over {layer.kv_num_heads} key/value heads"
        elif layer.growing not in (0, RING):
            wrong = f"the plugin writes into a static cache or a ring, and growing is {layer.growing}"
        elif layer.growing == RING and layer.window < 1:
            wrong = "a ring holds what a window sees, and this layer has none"
        elif layer.window < 0 or layer.softcap < 0:
            wrong = "window and softcap are 0 or more"
        if wrong:
            raise InvalidBundle(wrong, where, "export the bundle again: `gqa-export onnx --target trt-plugin`",
                                code="E-ENGINE-LAYER-VALUES")
        return layer

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.kv_num_heads

    @property
    def ring(self) -> bool:
        """Whether its cache's slots are used again."""
        return self.growing == RING

    @property
    def cache(self) -> str:
        """Type of the codes in its cache, a name of `attention_op.CACHE_CODES`; "" where it holds numbers."""
        return ""

    @property
    def scales(self) -> tuple[float, float]:
        """What a code of a key and one of a value is multiplied by."""
        return 1.0, 1.0

    @property
    def long(self) -> LongSetting | None:
        """How long prompts are approximated; None where they are not."""
        return None


@dataclass(frozen=True)
class Sizes:
    """The shapes of one call: B, S, C, D, E, R/2 (0: no rotation), M (rows of the rotary table), r, and T."""

    batch: int
    steps: int
    capacity: int
    head: int
    value_head: int
    dtype: str
    rotary_half: int = 0
    max_position: int = 1
    projections: int = 0

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], dtype: str) -> Sizes:
        """From the shapes of a node's inputs, by the contract's names. Raises GqaExportError for sizes that no launch
        holds: a grid has an end, and within a head the kernels count in 32 bits."""
        batch, kv_heads, capacity, head = shapes["past_key"]
        table = shapes.get("cos", (1, 0))
        sizes = cls(batch, shapes["query"][1], capacity, head, shapes["past_value"][3], dtype, table[1], table[0],
                    shapes.get("projections", (0, 0))[1])
        excess = find_excess(batch, kv_heads, capacity, head, sizes.value_head)
        if excess is not None:
            raise InvalidBundle(f"{excess.argument}: {excess.message}", "attention layer",
                                "build the engine with a smaller --capacity or --max-batch",
                                code="E-ENGINE-LAYER-LIMITS")
        return sizes


@dataclass(frozen=True)
class Launch:
    """One kernel launch. arguments: (type, value) in order, without the null scratch pointers that follow."""

    cubin: Cubin
    grid: tuple[int, int, int]
    arguments: tuple[tuple[str, int | float], ...]

    def parameters(self) -> tuple[tuple[int | float, ...], tuple[Any, ...]]:
        """(values, ctypes types) as `cuda.bindings.driver.cuLaunchKernel` takes them, scratch pointers included."""
        padded = (*self.arguments, *(("*", 0) for _ in range(self.cubin.scratch_pointers)))
        return (tuple(value for _, value in padded), tuple(KINDS.get(kind, ctypes.c_void_p) for kind, _ in padded))


def variants(layer: Layer, sizes: Sizes) -> dict[str, Variant]:
    """The kernels that a layer can need, by name: what is compiled into the engine."""
    shape = (sizes.dtype, layer.group, sizes.head, sizes.value_head)
    window, softcap, sinks = layer.window > 0, layer.softcap > 0, bool(layer.has_sinks)
    same: dict[str, Any] = {"ring": layer.ring}
    if layer.cache:  # with codes, whether there are new ones is compiled in
        same |= {"cache": layer.cache, "has_new": bool(layer.has_new)}
    wanted = {
        "prefill": Variant("prefill", *shape, plan.LONG_ROWS, window, softcap, sinks, ahead=layer.scale >= 0, **same),
        "decode": Variant("decode", *shape, layer.group, window, softcap, **same),
        "combine": Variant("combine", *shape, sinks=sinks, **same),
    }
    if layer.has_new or layer.has_rotary:
        wanted["append"] = Variant("append", *shape, rotary_half=sizes.rotary_half,
                                   interleaved=bool(layer.rotary_interleaved and layer.has_rotary),
                                   **{**same, "has_new": bool(layer.has_new)})
    if layer.long is not None:
        wanted |= {kernel: Variant(kernel, *shape, long_launch.rows_of(kernel, layer.long, layer.group),
                                   softcap=softcap, sinks=sinks, long=layer.long, projections=sizes.projections)
                   for kernel in long_launch.KERNELS}
    return wanted


def _visible(layer: Layer, sizes: Sizes, steps: int) -> int:
    return min(sizes.capacity, layer.window + steps - 1) if layer.window else sizes.capacity


def choose(layer: Layer, sizes: Sizes, decode_rows: int, sm_count: int) -> tuple[str, int]:
    """("decode", programs), ("prefill", 1) or ("long", 1). decode_rows: the decode kernel's tile_rows."""
    if layer.long is not None and sizes.steps > layer.long.exact_steps:
        return "long", 1
    rows = sizes.steps * layer.group
    if sizes.steps > 1 and rows > plan.LONG_ROWS:
        return "prefill", 1
    programs = plan.choose_programs(sizes.batch, layer.kv_num_heads, -(-rows // decode_rows),
                                    _visible(layer, sizes, sizes.steps), min(sm_count, SM_BOUND))
    return "decode", programs


def workspace_bytes(layer: Layer, largest: Sizes) -> int:
    """Enough for every batch up to B and every S up to S of `largest`, on every GPU."""
    most = 0
    for steps in range(1, largest.steps + 1):
        rows = steps * layer.group
        if steps > 1 and rows > plan.LONG_ROWS:
            break
        works = largest.batch * layer.kv_num_heads * -(-rows // plan.LEAST_ROWS)
        keys = _visible(layer, largest, steps)
        programs = plan.choose_programs(1, 1, works, keys, SM_BOUND)
        tile_rows = plan.row_block(layer.group)
        most = max(most, sum(parts_bytes(layer, replace(largest, steps=steps), tile_rows, programs)))
    return (rotated_bytes(layer, largest) + faults_bytes(layer, largest)
            + max(most, sum(long_bytes(layer, largest))))


def launches(layer: Layer, sizes: Sizes, cubins: Mapping[str, Cubin], pointers: Mapping[str, int], workspace: int,
             sm_count: int) -> list[Launch]:
    """What to launch, in order, on one stream.

    cubins: kernel -> compiled for this GPU. pointers: device addresses of the node's inputs and `output`, by the
    contract's names. workspace: device address of `workspace_bytes`.
    """
    decode_rows = cubins["decode"].tile_rows
    kind, programs = choose(layer, sizes, decode_rows, sm_count)
    faults = workspace + rotated_bytes(layer, sizes)
    partial = faults + faults_bytes(layer, sizes)
    partial_bytes, logsum_bytes, _ = parts_bytes(layer, sizes, decode_rows, programs)
    absent = pointers["query"]  # a valid address that the kernel never reads
    rotated = workspace if layer.has_rotary else pointers["query"]
    common: dict[str, int | float] = {
        "past_lengths_ptr": pointers["past_lengths"], "new_lengths_ptr": pointers["new_lengths"],
        "output_ptr": pointers["output"],
        "partial_ptr": partial, "logsum_ptr": partial + partial_bytes,
        "ranges_ptr": partial + partial_bytes + logsum_bytes, "sequences": sizes.batch,
        "kv_heads": layer.kv_num_heads, "steps": sizes.steps, "capacity": sizes.capacity,
        "least_keys": plan.LEAST_KEYS,
        "window": layer.window, "scale": layer.scale, "softcap": layer.softcap,
    }
    rows = sizes.steps * layer.group
    grids = {
        "append": (-(-sizes.steps // plan.APPEND_STEPS),
                   layer.kv_num_heads * layer.has_new + layer.num_heads * layer.has_rotary, sizes.batch),
        "prefill": (-(-rows // cubins["prefill"].tile_rows), layer.kv_num_heads, sizes.batch),
        "decode": (programs, 1, 1),
        "combine": (sizes.batch * sizes.steps * layer.num_heads, 1, 1),
    }
    appending = {**common, "query_ptr": pointers["query"], "key_ptr": pointers.get("key", absent),
                 "value_ptr": pointers.get("value", absent), "past_key_ptr": pointers["past_key"],
                 "past_value_ptr": pointers["past_value"], "cos_ptr": pointers.get("cos", absent),
                 "sin_ptr": pointers.get("sin", absent), "rotated_ptr": rotated, "max_position": sizes.max_position}
    attending = {**common, "query_ptr": rotated, "sinks_ptr": pointers.get("sinks", rotated),
                 "key_ptr": pointers["past_key"], "value_ptr": pointers["past_value"]}
    if layer.cache:
        key_scale, value_scale = layer.scales
        appending |= {"key_scale": key_scale, "value_scale": value_scale, "faults_ptr": faults}
        attending |= {"scale": layer.scale * key_scale, "value_scale": value_scale, "faults_ptr": faults}
    joining = {**attending, "capacity": sizes.capacity - layer.window + 1} if layer.ring else attending
    wanted = ["append"] if layer.has_new or layer.has_rotary else []
    if layer.long is not None and kind == "long":
        scratch = partial + long_bytes(layer, sizes)[0]
        attending |= {f"{name}_ptr": pointers[name] for name in ("fractions", "projections", "code_order")}
        attending |= {"selection_ptr": partial, "masses_ptr": scratch, "order_ptr": scratch}
        grids |= long_launch.grids(layer.long, **long_shape(layer, sizes), score_rows=cubins["score"].tile_rows,
                                   prefill_rows=cubins["long_prefill"].tile_rows)
    wanted += {"decode": ["decode", "combine"], "prefill": ["prefill"], "long": [*long_launch.KERNELS]}[kind]
    of = {"append": appending, "combine": joining}
    return [_launch(cubins[name], grids[name], of.get(name, attending)) for name in wanted]


def _launch(cubin: Cubin, grid: tuple[int, int, int], values: Mapping[str, int | float]) -> Launch:
    unknown = [name for name, _ in cubin.arguments if name not in values]
    if unknown:
        raise InvalidBundle(f"kernel {cubin.kernel} takes arguments that this plugin does not know: "
                            f"{', '.join(unknown)}", "the engine's attention layers", REBUILD,
                             code="E-ENGINE-KERNEL-MISMATCH")
    return Launch(cubin, grid, tuple((kind, values[name]) for name, kind in cubin.arguments))

