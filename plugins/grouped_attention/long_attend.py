"""The kernels for long prompts from PyTorch: what is compiled in, and their launches. Numbers in `long_launch`.

Dimensions as in `gqa_export.long_attention_op`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from gqa_plugins.grouped_attention import long_launch, long_prefill, long_select
from gqa_plugins.grouped_attention.long_launch import KERNELS
from gqa_plugins.grouped_attention.plan import FP_FUSION, Tiles, block

from gqa_export.long_attention_op import LongSetting

if TYPE_CHECKING:
    from gqa_plugins.grouped_attention.cubin import Variant

WARPS, STAGES = {"score": 4, "select": 8}, {"score": 3, "select": 1}
SHAPE = ("group", "head", "value_head", "softcap", "sinks", "projections")
"""what the constants of a kernel depend on, beside the setting and the tiles"""
ARGUMENTS = {"score": long_select.SCORE_ARGUMENTS, "select": long_select.SELECT_ARGUMENTS,
             "long_prefill": long_prefill.ARGUMENTS}


@dataclass(frozen=True)
class LongTables:
    """In place of random numbers: fractions [K, m] int32, projections [D, r] fp32, code_order [2^r] int32."""

    fractions: torch.Tensor
    projections: torch.Tensor
    code_order: torch.Tensor


def function(kernel: str, method: str) -> Any:
    """The Triton function of a kernel."""
    return {"score": {"tiles": long_select.score_tiles_kernel, "hyper": long_select.score_hyper_kernel},
            "select": {"tiles": long_select.select_tiles_kernel, "hyper": long_select.select_hyper_kernel},
            "long_prefill": {"tiles": long_prefill.long_tiles_kernel, "hyper": long_prefill.long_hyper_kernel},
            }[kernel][method]


def constants(kernel: str, setting: LongSetting, *, group: int, head: int, value_head: int, tiles: Tiles,
              softcap: bool, sinks: bool, projections: int) -> dict[str, Any]:
    """A kernel's compile-time arguments. tiles: of long_prefill."""
    is_tiles = setting.method == "tiles"
    chosen = setting.heavy_keys // setting.block if is_tiles else 0
    rows = long_launch.rows_of(kernel, setting, group)
    if kernel == "score":
        shape = {"GROUP": group, "HEAD": head, "BLOCK_HEAD": block(head), "BLOCK_ROWS": rows}
        if not is_tiles:
            return {**shape, "PROJECTIONS": projections}
        return {**shape, "BLOCK_KEYS": min(long_launch.VOTE_KEYS, block(setting.block)), "LEAF": setting.leaf,
                "TILE": setting.tile, "BLOCK": setting.block, "SCORE_ROWS": setting.score_rows,
                "HAS_SOFTCAP": softcap, "PRECISION": "ieee"}
    if kernel == "select":
        if not is_tiles:
            return {"GROUP": group, "LEAF": setting.leaf, "BINS": 1 << projections, "BLOCK_ROWS": rows}
        return {"LEAF": setting.leaf, "TILE": setting.tile, "BLOCK": setting.block, "CHOSEN": chosen,
                "ANCHORS": setting.anchors, "PARTS": long_launch.vote_parts(setting, group),
                "BLOCK_MASSES": long_launch.MASSES}
    own = ({"TILE": setting.tile, "BLOCK": setting.block, "CHOSEN": chosen, "SAMPLES": setting.samples} if is_tiles
           else {"HEAVY": setting.heavy_keys, "SAMPLES": setting.samples, "ANCHORS": setting.anchors})
    return {"GROUP": group, "HEAD": head, "VALUE_HEAD": value_head, "BLOCK_HEAD": block(head),
            "BLOCK_VALUE": block(value_head), "BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys,
            "LEAF": setting.leaf, **own, "HAS_SOFTCAP": softcap, "HAS_SINKS": sinks, "PRECISION": "ieee"}


def parts_of(kernel: str, setting: LongSetting, *, tiles: Tiles,
             **shape: Any) -> tuple[Any, Any, dict[str, Any], int, int]:
    """(Triton function, arguments, constants, warps, stages) of a kernel; shape: `SHAPE`."""
    main = kernel == "long_prefill"
    return (function(kernel, setting.method), ARGUMENTS[kernel][setting.method],
            constants(kernel, setting, tiles=tiles, **shape), tiles.warps if main else WARPS[kernel],
            tiles.stages if main else STAGES[kernel])


def fuses(kernel: str) -> bool:
    """Whether a kernel is compiled with fused multiply-adds. Not score: in a sum over threads each would keep its own
    product unrounded and get its neighbour's rounded, and what is chosen would depend on which thread looks."""
    return FP_FUSION and kernel != "score"


def compiled_as(variant: Variant, setting: LongSetting,
                capability: int) -> tuple[Any, Any, dict[str, Any], int, int, int, bool]:
    """What a `recipes.Recipe` of a variant is made of."""
    tiles = long_launch.choose_tiles(setting, variant.group, variant.head, variant.value_head, variant.dtype,
                                     capability)
    made = parts_of(variant.kernel, setting, tiles=tiles, **{name: getattr(variant, name) for name in SHAPE})
    rows = tiles.rows if variant.kernel == "long_prefill" else variant.rows
    return *made, rows, fuses(variant.kernel)


def attend_long(query: torch.Tensor, past_key: torch.Tensor, past_value: torch.Tensor, past_lengths: torch.Tensor,
                new_lengths: torch.Tensor, sinks: torch.Tensor | None, tables: LongTables, output: torch.Tensor, *,
                num_heads: int, scale: float, softcap: float, setting: LongSetting, dtype: str, capability: int,
                handed: torch.Tensor | None = None, tiles: Tiles | None = None,
                workspace: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """Write output [B, S, H*E] from query [B, S, H*D] and caches that hold the new tokens already. Three launches.

    Args:
        handed: a selection [B, K, N] to compute with, in place of the kernels' own.
        tiles, workspace: of long_prefill, and memory for the selection (int32) and the scratch (fp32); chosen and
            allocated where None.

    Returns:
        the selection, int32: [B, K, units * blocks] (tiles) or [B, K, C + G * S] (hyper).
    """
    batch, steps, _ = query.shape
    kv_heads, capacity, head = past_key.shape[1:]
    value_head, group = past_value.shape[3], num_heads // kv_heads
    shape = {"batch": batch, "steps": steps, "capacity": capacity, "kv_heads": kv_heads, "group": group}
    sizes = long_launch.scratch_elements(setting, **shape)
    tiles = tiles or long_launch.choose_tiles(setting, group, head, value_head, dtype, capability)
    selection, scratch = workspace or (torch.empty(sizes[0], dtype=torch.int32, device=query.device),
                                       torch.empty(max(1, sizes[1]), dtype=torch.float32, device=query.device))
    grids = long_launch.grids(setting, **shape, prefill_rows=tiles.rows,
                              score_rows=long_launch.rows_of("score", setting, group))
    values = {"query_ptr": query, "key_ptr": past_key, "value_ptr": past_value, "past_lengths_ptr": past_lengths,
              "new_lengths_ptr": new_lengths, "sinks_ptr": query if sinks is None else sinks,
              "fractions_ptr": tables.fractions, "projections_ptr": tables.projections,
              "code_order_ptr": tables.code_order, "selection_ptr": selection, "masses_ptr": scratch,
              "order_ptr": scratch.view(torch.int32), "output_ptr": output, "kv_heads": kv_heads, "steps": steps,
              "capacity": capacity, "scale": scale, "softcap": softcap}
    laid_out = selection.view(batch, kv_heads, -1)
    if handed is not None:
        laid_out[:, :, : handed.shape[2]] = handed
    skipped = () if handed is None else ("score", "select") if setting.method == "tiles" else ("score",)
    for kernel in (name for name in KERNELS if name not in skipped):
        launched, arguments, made_with, warps, stages = parts_of(
            kernel, setting, tiles=tiles, group=group, head=head, value_head=value_head, softcap=softcap > 0,
            sinks=sinks is not None, projections=tables.projections.shape[1])
        launched[grids[kernel]](*(values[name] for name, _ in arguments), **made_with, num_warps=warps,
                                num_stages=stages, enable_fp_fusion=fuses(kernel))
    return laid_out
