"""Kernel files with invented code, for the stand-in for CUDA: it reads the code as text, "NAME KIND KIND ...\\0"."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from pathlib import Path

from gqa_plugins.grouped_attention import fields, long_launch, plan
from gqa_plugins.grouped_attention.coded_layer import CodedLayer
from gqa_plugins.grouped_attention.cubin import Cubin, Variant
from gqa_plugins.grouped_attention.fields import Key
from gqa_plugins.grouped_attention.launch import Layer, Sizes, variants
from gqa_plugins.grouped_attention.long_layer import LongLayer

from gqa_export.attention_op import RING
from gqa_export.long_attention_op import LongSetting

ATTENTION = ("query_ptr", "key_ptr", "value_ptr", "past_lengths_ptr", "new_lengths_ptr", "kv_heads", "steps",
             "capacity", "window", "scale", "softcap")
ARGUMENTS = {
    "append": ("query_ptr", "key_ptr", "value_ptr", "past_key_ptr", "past_value_ptr", "past_lengths_ptr",
               "new_lengths_ptr", "cos_ptr", "sin_ptr", "rotated_ptr", "kv_heads", "steps", "capacity", "max_position"),
    "prefill": (*ATTENTION, "sinks_ptr", "output_ptr"),
    "decode": (*ATTENTION, "partial_ptr", "logsum_ptr", "ranges_ptr", "sequences", "least_keys"),
    "combine": ("partial_ptr", "logsum_ptr", "ranges_ptr", "past_lengths_ptr", "new_lengths_ptr", "sinks_ptr",
                "output_ptr", "kv_heads", "steps", "capacity"),
}
LONG = ("past_lengths_ptr", "new_lengths_ptr", "selection_ptr", "kv_heads", "steps", "capacity")
LONG_ARGUMENTS = {
    "tiles": {"score": (*LONG[:2], *LONG[3:], "query_ptr", "key_ptr", "masses_ptr", "scale", "softcap"),
              "select": (*LONG, "masses_ptr"),
              "long_prefill": (*LONG, "query_ptr", "key_ptr", "value_ptr", "sinks_ptr", "fractions_ptr", "output_ptr",
                               "scale", "softcap")},
    "hyper": {"score": (*LONG, "query_ptr", "key_ptr", "projections_ptr", "code_order_ptr"),
              "select": (*LONG, "order_ptr"),
              "long_prefill": (*LONG, "query_ptr", "key_ptr", "value_ptr", "sinks_ptr", "fractions_ptr", "order_ptr",
                               "output_ptr", "scale", "softcap")},
}
WHOLE_NUMBERS = ("fractions_ptr", "code_order_ptr", "selection_ptr", "order_ptr")


CODED = {"append": ("key_scale", "value_scale"), "prefill": ("value_scale",), "decode": ("value_scale",), "combine": ()}
CACHE = {"append": ("past_key_ptr", "past_value_ptr"), "prefill": ("key_ptr", "value_ptr"),
         "decode": ("key_ptr", "value_ptr")}


def kind_of(name: str, dtype: str) -> str:
    if name in ("partial_ptr", "logsum_ptr", "masses_ptr", "projections_ptr"):
        return "*fp32"
    if name == "faults_ptr":
        return "*i32"
    if name == "ranges_ptr":
        return "*i64"
    if name.endswith("lengths_ptr") or name in WHOLE_NUMBERS:
        return "*i32"
    if name.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if name in ("scale", "softcap", "key_scale", "value_scale") else "i32"


def make_cubin(variant: Variant, capability: int, chance: random.Random) -> Cubin:
    """A kernel of this variant that takes its arguments in an order of its own."""
    known = LONG_ARGUMENTS[variant.long.method] if variant.long else ARGUMENTS
    needed = known[variant.kernel]
    if variant.cache:
        faults = ("faults_ptr",) if variant.has_new and variant.kernel != "decode" else ()
        needed += CODED[variant.kernel] + faults
    names = chance.sample(needed, len(needed))
    held = f"*{plan.CACHE_KINDS[variant.cache]}" if variant.cache else f"*{variant.dtype}"
    arguments = tuple((name, held if name in CACHE.get(variant.kernel, ()) else kind_of(name, variant.dtype))
                      for name in names)
    name = f"{variant.kernel}_{capability}_{chance.randrange(10**6)}"
    code = " ".join([name, *(kind for _, kind in arguments)]).encode() + b"\0"
    constants = {"GROUP": variant.group, "HEAD": variant.head, "VALUE_HEAD": variant.value_head}
    if variant.ring or chance.randrange(2):  # files of before there were rings do not name it
        constants |= {"RING": int(variant.ring)}
    if variant.kernel == "append":
        constants |= {"HALF": variant.rotary_half, "INTERLEAVED": int(variant.interleaved),
                      "HAS_NEW": int(variant.has_new)}
    if variant.kernel in ("prefill", "decode"):
        constants |= {"HAS_WINDOW": int(variant.window), "HAS_SOFTCAP": int(variant.softcap)}
    if variant.kernel in ("prefill", "combine"):
        constants |= {"HAS_SINKS": int(variant.sinks)}
    if variant.long is not None:
        named = long_launch.compiled_in(variant.long, variant.projections, variant.group)
        constants |= {key: named[key] for key in chance.sample(sorted(named), chance.randrange(1, len(named) + 1))}
    return Cubin(variant.kernel, name, capability, chance.choice((0, 1024, 70000)), chance.choice((128, 256)),
                 chance.choice((16, 32, 64, 128)), arguments, {key: str(value) for key, value in constants.items()},
                 code, scratch_pointers=chance.randrange(3))


def make_kernels(layer: Layer, sizes: Sizes, capabilities: tuple[int, ...],
                 chance: random.Random) -> tuple[tuple[Key, ...], dict[str, Cubin], bytes]:
    """(keys, sha256 -> cubin, container) of every kernel that a layer needs, for each capability."""
    keys, cubins, files = [], {}, []
    for kernel, variant in variants(layer, sizes).items():
        for capability in capabilities:
            cubin = make_cubin(variant, capability, chance)
            data = cubin.to_bytes()
            (sha256,) = fields.unpack(fields.pack([data]))
            keys.append(Key(kernel, capability, sha256))
            cubins[sha256] = cubin
            files.append(data)
    return tuple(keys), cubins, fields.pack(files)


def random_layer(chance: random.Random) -> tuple[Layer, Sizes]:
    """A layer and the shapes of a call, over everything that the kernels take."""
    kv_heads = chance.choice((1, 2, 3, 8))
    group = chance.choice((1, 2, 3, 4, 7, 8))
    has_rotary = chance.randrange(2)
    layer = Layer(num_heads=kv_heads * group, kv_num_heads=kv_heads, scale=chance.choice((0.125, 0.25, 1.0)),
                  softcap=chance.choice((0.0, 30.0)), window=chance.choice((0, 0, 128, 4096)),
                  rotary_interleaved=chance.randrange(2), growing=0, has_rotary=has_rotary,
                  has_sinks=chance.randrange(2), has_new=chance.choice((1, 1, 1, 0)))
    if layer.window and chance.randrange(2):
        layer = replace(layer, growing=RING)
    head = chance.choice((32, 64, 80, 128, 256))
    sizes = Sizes(batch=chance.choice((1, 1, 2, 5, 16)), steps=chance.choice((1, 1, 1, 2, 17, 64, 129, 1000)),
                  capacity=chance.choice((16, 256, 1000, 4096, 131072)), head=head,
                  value_head=chance.choice((head, 64)), dtype=chance.choice(("fp16", "bf16", "fp32")))
    if has_rotary:
        sizes = replace(sizes, rotary_half=chance.choice((8, head // 2)), max_position=chance.choice((64, 4096)))
    return layer, sizes


def random_long_layer(chance: random.Random) -> tuple[LongLayer, Sizes]:
    """The same of version 2, most of them approximated."""
    layer, sizes = random_layer(chance)
    setting = chance.choice((
        LongSetting("tiles", leaf=256, heavy_keys=chance.choice((64, 96)), samples=chance.choice((16, 128)), anchors=3,
                    tile=chance.choice((64, 128)), block=32, score_rows=chance.choice((4, 8)), exact_steps=16),
        LongSetting("hyper", leaf=1024, heavy_keys=256, samples=chance.choice((16, 128)), anchors=0, exact_steps=1)))
    own = setting.attributes() if chance.random() < 0.8 else dict.fromkeys(setting.attributes(), 0)
    given = {**asdict(layer), "window": 0, "growing": 0}
    return LongLayer(**given, **own), replace(sizes, projections=7 if own["method"] else 0)


def random_coded_layer(chance: random.Random) -> tuple[CodedLayer, Sizes]:
    """The same of version 3: over a cache of int8 or fp8 codes."""
    layer, sizes = random_layer(chance)
    return CodedLayer(**asdict(layer), cache_codes=chance.choice((1, 2)), key_scale=chance.choice((0.5, 0.03125)),
                      value_scale=chance.choice((0.25, 0.0625))), sizes


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path
