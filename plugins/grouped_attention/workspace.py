"""Bytes of the parts of a layer's workspace, in the order in which `launch` lays them out. Standard library only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gqa_plugins.grouped_attention import long_launch, plan

if TYPE_CHECKING:
    from gqa_plugins.grouped_attention.launch import Layer, Sizes

ALIGNMENT = 256


def aligned(size: int) -> int:
    """Bytes of a part of the workspace, up to the next."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def rotated_bytes(layer: Layer, sizes: Sizes) -> int:
    """Of the queries that append rotates."""
    if not layer.has_rotary:
        return 0
    return aligned(sizes.batch * sizes.steps * layer.num_heads * sizes.head * plan.DTYPE_BYTES[sizes.dtype])


def faults_bytes(layer: Layer, sizes: Sizes) -> int:
    """Of the faults that append finds where it writes codes."""
    if not (layer.cache and layer.has_new):
        return 0
    return aligned(4 * sizes.batch * layer.kv_num_heads * -(-sizes.steps // plan.APPEND_STEPS))


def parts_bytes(layer: Layer, sizes: Sizes, tile_rows: int, programs: int) -> tuple[int, int, int]:
    """Of partial outputs, their log-sum-exp, and where a row's begin and end. No less for a longer tile, whose rows are
    padded: tiles are powers of two."""
    partial, logsum, ranges = plan.workspace_elements(sizes.batch, sizes.steps, layer.num_heads, layer.kv_num_heads,
                                                      sizes.value_head, tile_rows, programs)
    return aligned(4 * partial), aligned(4 * logsum), aligned(8 * ranges)


def long_bytes(layer: Layer, sizes: Sizes) -> tuple[int, int]:
    """Of the selection, and of masses or orders: numbers of 4 bytes."""
    if layer.long is None:
        return 0, 0
    selection, scratch = long_launch.scratch_elements(layer.long, **long_shape(layer, sizes))
    return aligned(4 * selection), aligned(4 * scratch)


def long_shape(layer: Layer, sizes: Sizes) -> dict[str, int]:
    """As `long_launch` takes it."""
    return {"batch": sizes.batch, "steps": sizes.steps, "capacity": sizes.capacity, "kv_heads": layer.kv_num_heads,
            "group": layer.group}
