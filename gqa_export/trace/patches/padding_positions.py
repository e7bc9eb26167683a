"""Positions that start after the padding token's id and skip padding tokens (RoBERTa and its kin).

Their embeddings make positions from the token ids if none are given; if some are given they are used as they are,
without the offset. So the offset is added here: padding_idx + 1 + position, and padding_idx for the padding token,
which the next ones then do not count.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import attention_hook
from .registry import Patch

WHY = "positions are made from token ids and the padding token's id"


def _make(original: Any, _module: Any) -> Any:
    def forward(self: Any, input_ids: Any = None, token_type_ids: Any = None, position_ids: Any = None,
                inputs_embeds: Any = None, **_: Any) -> torch.Tensor:
        positions_BS, real_BS = attention_hook.positions(), input_ids.ne(self.padding_idx)
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        # a running count without CumSum: how many real tokens stand at or before each place
        counts_BS = (real_BS[:, None, :] & (steps[:, None] >= steps[None, :])).sum(-1)
        made = (counts_BS + positions_BS[:, :1]) * real_BS + self.padding_idx
        return original(self, input_ids=input_ids, token_type_ids=token_type_ids, position_ids=made,
                        inputs_embeds=inputs_embeds)

    return forward


PATCHES = tuple(Patch(f"{module}.modeling_{file}", f"{name}.forward", _make, WHY) for module, file, name in (
    ("camembert", "camembert", "CamembertEmbeddings"),
    ("data2vec", "data2vec_text", "Data2VecTextEmbeddings"),
    ("roberta", "roberta", "RobertaEmbeddings"),
    ("roberta_prelayernorm", "roberta_prelayernorm", "RobertaPreLayerNormEmbeddings"),
    ("xlm_roberta", "xlm_roberta", "XLMRobertaEmbeddings"),
    ("xlm_roberta_xl", "xlm_roberta_xl", "XLMRobertaXLEmbeddings"),
    ("xmod", "xmod", "XmodEmbeddings"),
))
