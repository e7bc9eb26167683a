"""Masks of models where only text comes in, unpacked: parts of them that are about something else.

A multimodal model numbers the tokens of each image, -1 for text, and lets tokens of one number see each other both ways
(`blockwise_overlay` of transformers). Without images it makes a tensor of nothing but -1. The probe runs on the meta
device, where tensors do not have values, so the value is remembered from the call that made the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

KNOWN = "gqa_constant"
"""the attribute of a tensor that holds the one value of all its elements"""


class _Constants(TorchFunctionMode):
    """Remembers the value of tensors that `torch.full` made, through padding with that value."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), others: Any = None) -> Any:
        others = others or {}
        result = function(*arguments, **others)
        if function is torch.full:
            setattr(result, KNOWN, arguments[1] if len(arguments) > 1 else others["fill_value"])
        elif function is torch.nn.functional.pad and isinstance(result, torch.Tensor) and arguments:
            known = getattr(arguments[0], KNOWN, None)
            mode = others.get("mode", arguments[2] if len(arguments) > 2 else "constant")
            value = others.get("value", arguments[3] if len(arguments) > 3 else None)
            if known is not None and mode == "constant" and known == (value or 0):
                setattr(result, KNOWN, known)
        return result


@contextmanager
def of_text(config: Any) -> Iterator[None]:
    """Inside, block masks, packed sequences and padding are looked for as text alone has them.

    A block mask whose numbers are known to be negative everywhere is the mask beside it. Rows are never packed, which
    transformers would find out from the values of positions wherever a model calls for a mask without padding; and
    chunks of attention begin with a row's first token, because padding on the left is refused.

    Args:
        config: a transformers configuration; one of a text model alone does not have blocks.
    """
    import transformers.masking_utils as masks

    blocks: Any = getattr(masks, "blockwise_overlay", None)
    chunks: Any = getattr(masks, "chunked_overlay", None)

    def block_overlay(block_sequence_ids: torch.Tensor) -> Callable[..., Any]:
        known = getattr(block_sequence_ids, KNOWN, None)
        if known is None or known >= 0:
            return blocks(block_sequence_ids)
        return lambda batch, head, query, key: (query < 0) & (key < 0)  # positions are not negative

    def chunk_overlay(chunk_size: int, left_padding: torch.Tensor) -> Callable[..., Any]:
        return chunks(chunk_size, torch.zeros(left_padding.shape, dtype=torch.long, device="cpu"))

    ours = {"find_packed_sequence_indices": lambda position_ids: None, "blockwise_overlay": block_overlay,
            "chunked_overlay": chunk_overlay}
    known = {name: getattr(masks, name) for name in ours if hasattr(masks, name)}  # older releases lack the second
    try:
        for name in known:
            setattr(masks, name, ours[name])
        with _Constants() if config.get_text_config() is not config else nullcontext():
            yield
    finally:
        for name, original in known.items():
            setattr(masks, name, original)
