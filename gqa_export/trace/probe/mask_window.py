"""What a mask function really computes: causal and a window, or a refusal that names what it is.

A mask hides facts that no argument carries (chunks, bidirectional blocks, prefixes, packed sequences, a window that
no layer mentions). So the function itself is evaluated on an index grid. Positions q (query) and k (key) are
absolute; a window of W shows k in (q - W, q].
"""

from __future__ import annotations

import torch

from ...errors import GqaExportError, UnsupportedModel
from ..attention_hook import MaskTag

ROWS_AT_ONCE, LONGEST_CHECKED = 256, 1 << 14
"""rows of a mask evaluated at once, where all of them are; the longest cache for which that is done"""


def window_of(tag: MaskTag | None, layer: int, positions: int, num_heads: int, capacity: int = 0) -> int:
    """The window of a layer's mask, found by evaluating the mask function.

    The last row is evaluated in full to find the width W, then whole rows around 0, W - 1, W, W + 1, 2W and the last
    position, for the first and last head. A mask that is another one beyond some position, as that of attention in
    chunks is, is plainly causal for a cache that ends before it: then every row up to the capacity is evaluated.

    Args:
        tag: the mask that the layer was given; None if it did not come from transformers' mask functions.
        layer: its number, for the message.
        positions: sequence length to evaluate at.
        num_heads: query heads of the layer.
        capacity: tokens that the cache shall hold; 0 is `positions`.

    Returns:
        Tokens visible including the current one; 0 if all of the past is.

    Raises:
        UnsupportedModel: a row is not causal with that window, or depends on more than positions.
    """
    where = f"layer {layer}"
    if tag is None:
        raise UnsupportedModel("the attention mask of a layer was not made by transformers' mask functions", where,
                               "this model builds its masks itself, so what they hide cannot be checked; "
                               "it is not supported", code="E-MODEL-OWN-MASK")
    last = positions - 1
    visible = _rows(tag, layer, torch.tensor([last]), positions, 0)[0]
    width = int(visible.sum())
    window = 0 if width >= positions else width
    near = {0, 1, window - 1, window, window + 1, 2 * window, 2 * window + 1, positions // 2, last - 1, last}
    queries = torch.tensor(sorted(q for q in near if 0 <= q <= last))
    keys = torch.arange(positions)
    expected = keys <= queries[:, None]
    if window:
        expected &= keys > queries[:, None] - window
    for head in {0, num_heads - 1}:
        rows = _rows(tag, layer, queries, positions, head)
        if not torch.equal(rows, expected):
            causal = _causal_up_to(tag, layer, min(positions, LONGEST_CHECKED), (0, num_heads - 1))
            if 0 < capacity <= causal:
                return 0
            q, k = (int(x) for x in (rows != expected).nonzero()[0])
            does = "shows" if rows[q, k] else "hides"
            found = (f"the attention mask is not causal with a window ({describe(tag)}): from position "
                     f"{int(queries[q])} it {does} position {k}")
            if causal > 1:
                raise UnsupportedModel(found, where, f"up to {causal} tokens it is plainly causal: use --capacity "
                                       f"{causal} or less", code="E-MODEL-MASK")
            raise UnsupportedModel(found, where, "chunked, bidirectional, prefix and packed attention cannot be held "
                                   "by grouped-query attention with a cache; it is refused rather than exported wrong",
                                   code="E-MODEL-MASK")
    return window


def _causal_up_to(tag: MaskTag, layer: int, positions: int, heads: tuple[int, ...]) -> int:
    """The longest sequence in which every token sees all before it and itself, and nothing else."""
    longest, keys = positions, torch.arange(positions)
    for start in range(0, positions, ROWS_AT_ONCE):
        if start >= longest:
            break
        queries = torch.arange(start, min(start + ROWS_AT_ONCE, positions))
        for head in set(heads):
            wrong = (_rows(tag, layer, queries, positions, head) != (keys <= queries[:, None])).nonzero()
            if len(wrong):
                longest = min(longest, int(torch.maximum(wrong[:, 0] + start, wrong[:, 1]).min()))
    return longest


def _rows(tag: MaskTag, layer: int, queries: torch.Tensor, positions: int, head: int) -> torch.Tensor:
    """The mask's rows [len(queries), positions] as booleans."""
    zero, head_index = torch.zeros((), dtype=torch.long), torch.tensor(head)
    keys = torch.arange(positions)
    try:
        with torch.device("cpu"):
            if tag.use_vmap:
                inner = torch.vmap(lambda q, k: tag.function(zero, head_index, q, k), in_dims=(None, 0))
                result = torch.vmap(inner, in_dims=(0, None))(queries, keys)
            else:
                result = tag.function(zero, head_index, queries[:, None], keys[None, :])
        return torch.broadcast_to(result, (len(queries), positions)).to("cpu", torch.bool)
    except GqaExportError:
        raise
    except Exception as error:
        raise UnsupportedModel(f"the attention mask depends on more than positions ({describe(tag)})", f"layer {layer}",
                               "chunked, packed and data-dependent masks cannot be held by grouped-query attention "
                               "with a cache; it is refused rather than exported wrong",
                               code="E-MODEL-MASK-DATA") from error


def describe(tag: MaskTag) -> str:
    """The names of the mask functions that make up this one, as transformers calls them."""
    names: list[str] = []

    def visit(function: object, depth: int) -> None:
        if depth > 6 or not callable(function):
            return
        name = getattr(function, "__qualname__", "").split(".<locals>")[0]
        if name and name not in names and name not in ("and_masks", "or_masks"):
            names.append(name)
        for cell in getattr(function, "__closure__", None) or ():
            content = cell.cell_contents
            for item in content if isinstance(content, tuple | list) else (content,):
                visit(item, depth + 1)

    visit(tag.function, 0)
    return ", ".join(names) or "unnamed"
