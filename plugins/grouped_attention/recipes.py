"""How each kernel variant is compiled: function, arguments, what is compiled in, options. Imports Triton when asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gqa_plugins.grouped_attention import long_launch, plan
from gqa_plugins.grouped_attention.plan import FP_FUSION

from gqa_export.errors import GqaExportError

if TYPE_CHECKING:
    from gqa_plugins.grouped_attention.cubin import Variant

KERNELS = ("append", "prefill", "decode", "combine")


@dataclass(frozen=True)
class Recipe:
    """How a variant is compiled: the Triton function, its arguments, what is compiled in, and the options."""

    kernel: Any
    arguments: Sequence[tuple[str, str]]
    constants: dict[str, Any]
    warps: int
    stages: int
    tile_rows: int
    fp_fusion: bool = FP_FUSION

    @property
    def options(self) -> dict[str, Any]:
        """As Triton's compiler takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": self.fp_fusion}


def recipe(variant: Variant, capability: int) -> Recipe:
    """How a variant is compiled for one capability. Raises GqaExportError for a kernel that there is none of."""
    from gqa_plugins.grouped_attention import append, decode, prefill

    tiles = plan.choose_tiles(max(1, variant.rows), variant.head, variant.value_head, variant.dtype, capability)
    shape = {"group": variant.group, "head": variant.head, "value_head": variant.value_head}
    attention = {**shape, "tiles": tiles, "window": variant.window, "softcap": variant.softcap, "ring": variant.ring}
    if variant.kernel == "append":
        values = append.constants(**shape, rotary_half=variant.rotary_half, interleaved=variant.interleaved,
                                  has_new=variant.has_new, ring=variant.ring)
        return Recipe(append.append_kernel, append.ARGUMENTS + _coded(variant, append.CODED_ARGUMENTS), values,
                      append.WARPS, append.STAGES, plan.APPEND_STEPS)
    if variant.kernel == "prefill":
        ahead = variant.ahead and plan.works_ahead(tiles, variant.head, variant.value_head, variant.dtype, capability,
                                                     variant.cache)
        values = prefill.constants(**attention, sinks=variant.sinks, split_band=plan.DTYPE_BYTES[variant.dtype] < 4,
                                   ahead=ahead)
        return Recipe(prefill.prefill_kernel, prefill.ARGUMENTS + _coded(variant, prefill.CODED_ARGUMENTS), values,
                      tiles.warps, tiles.stages, tiles.rows)
    if variant.kernel == "decode":
        values = decode.constants(**attention)
        coded = decode.CODED_ARGUMENTS if variant.cache else ()
        return Recipe(decode.decode_kernel, decode.ARGUMENTS + coded, values, tiles.warps, tiles.stages, tiles.rows)
    if variant.kernel == "combine":
        values = decode.combine_constants(**{name: getattr(variant, name) for name in decode.JOINED})
        return Recipe(decode.combine_kernel, decode.COMBINE_ARGUMENTS + _coded(variant, ()), values,
                      decode.COMBINE_WARPS, decode.COMBINE_STAGES, 1, decode.COMBINE_FP_FUSION)
    if variant.long is not None and variant.cache:
        raise GqaExportError(f"kernel {variant.kernel} is for long prompts, and reads caches of numbers only",
                             f"cache of {variant.cache} codes", "leave out --kv-cache or --long-attention",
                             code="E-ENGINE-KERNEL-UNKNOWN")
    if variant.kernel in long_launch.KERNELS and variant.long is not None:
        from gqa_plugins.grouped_attention import long_attend

        return Recipe(*long_attend.compiled_as(variant, variant.long, capability))
    raise GqaExportError(f"kernel {variant.kernel!r} is unknown", "Variant.kernel", f"use one of {', '.join(KERNELS)}",
                         code="E-ENGINE-KERNEL-UNKNOWN")


def _coded(variant: Variant, scales: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The arguments that a kernel has for a cache of codes only."""
    from gqa_plugins.grouped_attention import append

    return (*scales, *(append.FAULTS if variant.has_new else ())) if variant.cache else ()
