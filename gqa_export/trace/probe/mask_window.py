"""What a mask function really computes: causal with a window or in chunks, or a refusal that names what it is.

A mask hides facts that no argument carries (chunks, bidirectional blocks, prefixes, packed sequences, a window that
no layer mentions). So the function itself is evaluated on an index grid. Positions q (query) and k (key) are
absolute; a window of W shows k in (q - W, q], chunks of C those with k <= q and k // C == q // C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...errors import GqaExportError, UnsupportedModel
from ..attention_hook import MaskTag

ROWS_AT_ONCE, LONGEST_CHECKED = 256, 1 << 14
"""rows of a mask evaluated at once, where all of them are; positions for which that is done"""
BORDERS = 64
"""chunks, from the first on, whose borders are evaluated"""


class Visible(NamedTuple):
    """What a token sees of those before it: the last `window`, itself included, or those of its own `chunk`; 0 and 0
    is all."""

    window: int = 0
    chunk: int = 0


def visible_of(tag: MaskTag | None, layer: int, positions: int, num_heads: int, capacity: int = 0) -> Visible:
    """The window or the chunks of a layer's mask, found by evaluating the mask function.

    The last row is evaluated in full to find the width W, then whole rows around 0, W - 1, W, W + 1, 2W and the last
    position, for the first and last head. Where they are not those of a window, the rows that see the first token tell
    the size of a chunk, and every row up to LONGEST_CHECKED is evaluated, further on those on both sides of borders.
    A mask that is another one beyond some position is plainly causal for a cache that ends before it: then every row
    up to the capacity is evaluated.

    Args:
        tag: the mask that the layer was given; None if it did not come from transformers' mask functions.
        layer: its number, for the message.
        positions: sequence length to evaluate at.
        num_heads: query heads of the layer.
        capacity: tokens that the cache shall hold; 0 is `positions`.

    Returns:
        The window or the size of a chunk.

    Raises:
        UnsupportedModel: a row is not causal with that window or in chunks, or depends on more than positions.
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
            if chunk := _chunk_of(tag, layer, positions, (0, num_heads - 1)):
                return Visible(chunk=chunk)
            causal = _causal_up_to(tag, layer, min(positions, LONGEST_CHECKED), (0, num_heads - 1))
            if 0 < capacity <= causal:
                return Visible()
            q, k = (int(x) for x in (rows != expected).nonzero()[0])
            does = "shows" if rows[q, k] else "hides"
            found = (f"the attention mask is not causal with a window or in chunks ({describe(tag)}): from position "
                     f"{int(queries[q])} it {does} position {k}")
            if causal > 1:
                raise UnsupportedModel(found, where, f"up to {causal} tokens it is plainly causal: use --capacity "
                                       f"{causal} or less", code="E-MODEL-MASK")
            raise UnsupportedModel(found, where, "bidirectional, prefix and packed attention cannot be held "
                                   "by grouped-query attention with a cache; it is refused rather than exported wrong",
                                   code="E-MODEL-MASK")
    return Visible(window)


def _chunk_of(tag: MaskTag, layer: int, positions: int, heads: tuple[int, ...]) -> int:
    """The size of the chunks of positions that a mask consists of; 0 if it does not."""
    first = _rows(tag, layer, torch.arange(positions), 1, 0)[:, 0]
    chunk = int(first.sum())
    if not 0 < chunk < positions or not first[:chunk].all():
        return 0
    last = positions - 1
    borders = {*range(0, min(positions, BORDERS * chunk + 1), chunk), last // chunk * chunk}
    near = {q for border in borders for q in (border - 1, border, border + 1, border + chunk // 2)}
    queries = torch.tensor(sorted(q for q in near | {last} if 0 <= q <= last))
    expected, every = _chunk_rows(queries, torch.arange(positions), chunk), min(positions, LONGEST_CHECKED)
    same = all(torch.equal(_rows(tag, layer, queries, positions, head), expected) for head in set(heads))
    return chunk if same and _in_chunks_up_to(tag, layer, every, heads, chunk) == every else 0


def _chunk_rows(queries: torch.Tensor, keys: torch.Tensor, chunk: int) -> torch.Tensor:
    """Rows [len(queries), len(keys)] of attention in chunks, as booleans."""
    return (keys <= queries[:, None]) & (keys // chunk == queries[:, None] // chunk)


def _causal_up_to(tag: MaskTag, layer: int, positions: int, heads: tuple[int, ...]) -> int:
    """The longest sequence in which every token sees all before it and itself, and nothing else."""
    return _in_chunks_up_to(tag, layer, positions, heads, positions)


def _in_chunks_up_to(tag: MaskTag, layer: int, positions: int, heads: tuple[int, ...], chunk: int) -> int:
    """The longest sequence in which every token sees those of its chunk up to itself, and nothing else."""
    longest, keys = positions, torch.arange(positions)
    for start in range(0, positions, ROWS_AT_ONCE):
        if start >= longest:
            break
        queries = torch.arange(start, min(start + ROWS_AT_ONCE, positions))
        for head in set(heads):
            wrong = (_rows(tag, layer, queries, positions, head) != _chunk_rows(queries, keys, chunk)).nonzero()
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
                               "packed and data-dependent masks cannot be held by grouped-query attention "
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
