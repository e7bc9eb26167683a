"""Which of the kernels that an engine carries run on this GPU and belong to this layer. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gqa_plugins.grouped_attention import long_launch, plan
from gqa_plugins.grouped_attention.fields import REBUILD, Key

from gqa_export.errors import InvalidBundle

if TYPE_CHECKING:
    from gqa_plugins.grouped_attention.cubin import Cubin
    from gqa_plugins.grouped_attention.launch import Layer, Sizes

CACHE_ARGUMENT = {"append": "past_key_ptr", "prefill": "key_ptr", "decode": "key_ptr"}
LOOKS = ("append", "prefill", "combine")  # kernels that have faults_ptr where codes are written
ARCHITECTURE_ONLY = 90  # from this capability on, a cubin runs on its own capability alone


def pick(keys: Iterable[Key], capability: int) -> dict[str, Key]:
    """kernel -> the key whose cubin runs on a GPU of this capability.

    The same capability, or, below 9.0, the nearest lower one of the same generation that asks for no more shared
    memory than this one has. Raises GqaExportError that names what the engine carries.
    """
    keys = tuple(keys)
    chosen: dict[str, Key] = {}
    for key in sorted(keys, key=lambda key: key.capability):
        near = (key.capability // 10 == capability // 10 and key.capability <= capability < ARCHITECTURE_ONLY
                and plan.SHARED_KIB.get(key.capability, 0) <= plan.SHARED_KIB.get(capability, 0))
        if key.capability == capability or near:
            chosen[key.kernel] = key
    if not chosen or {key.kernel for key in keys} != set(chosen):
        there = ", ".join(sorted({f"{key.capability // 10}.{key.capability % 10}" for key in keys})) or "none"
        dotted = f"{capability // 10}.{capability % 10}"
        raise InvalidBundle(f"this GPU has compute capability {dotted}, the engine carries kernels for {there}",
                            "the engine's attention layers",
                            f"build it with `gqa-export trt BUNDLE -o DIR --compute-capability {dotted}`",
                             code="E-ENGINE-CAPABILITY")
    return chosen


def _check_cache(cubin: Cubin, kinds: dict[str, str], layer: Layer, dtype: str) -> None:
    """Refuse a kernel that was compiled for a cache of another type, or does not look for what codes cannot say."""
    name = CACHE_ARGUMENT.get(cubin.kernel, "")
    held = plan.CACHE_KINDS[layer.cache] if layer.cache else dtype
    looks = "faults_ptr" in kinds
    if kinds.get(name, f"*{held}") == f"*{held}" and (
            cubin.kernel not in LOOKS or looks == bool(layer.cache and layer.has_new)):
        return
    found = kinds[name][1:] if name in kinds else "another type"
    raise InvalidBundle(f"kernel {cubin.kernel} was compiled for a cache of {found}, the layer has one of {held}",
                        "the engine's attention layers", REBUILD,
                        code="E-ENGINE-KERNEL-MISMATCH")


def check_cubin(cubin: Cubin, layer: Layer, sizes: Sizes) -> None:
    """Refuse a kernel that was compiled for another layer."""
    expected = {"GROUP": layer.group, "HEAD": sizes.head, "VALUE_HEAD": sizes.value_head, "HALF": sizes.rotary_half,
                "HAS_WINDOW": int(layer.window > 0), "HAS_SOFTCAP": int(layer.softcap > 0),
                "HAS_SINKS": layer.has_sinks, "HAS_NEW": layer.has_new, "RING": int(layer.ring),
                "INTERLEAVED": int(bool(layer.rotary_interleaved and layer.has_rotary)),
                **(long_launch.compiled_in(layer.long, sizes.projections, layer.group) if layer.long else {})}
    constants = {"RING": "0", **cubin.constants}  # files of before there were rings do not name it
    for name, value in expected.items():
        if name in constants and int(constants[name]) != value:
            raise InvalidBundle(f"kernel {cubin.kernel} was compiled for {name} = {constants[name]}, "
                                f"the layer has {value}", "the engine's attention layers", REBUILD,
                                 code="E-ENGINE-KERNEL-MISMATCH")
    kinds = dict(cubin.arguments)
    if layer.long and cubin.kernel in ("score", "select") and \
            ("masses_ptr" in kinds) != (layer.long.method == "tiles"):
        raise InvalidBundle(f"kernel {cubin.kernel} was compiled for another method than {layer.long.method}",
                            "the engine's attention layers", REBUILD, code="E-ENGINE-KERNEL-MISMATCH")
    for name in ("query_ptr", "output_ptr"):
        if kinds.get(name, f"*{sizes.dtype}") != f"*{sizes.dtype}":
            raise InvalidBundle(f"kernel {cubin.kernel} was compiled for {kinds[name][1:]}, the layer has "
                                f"{sizes.dtype}", "the engine's attention layers", REBUILD,
                                 code="E-ENGINE-KERNEL-MISMATCH")
    _check_cache(cubin, kinds, layer, sizes.dtype)
