"""How large the inputs of each matrix are for a text: the mean square of every column, with which errors are weighed.

One pass over the text, row by row, in fp32; weights are read when their layer runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from ..checkpoint.expert_products import factor_of, follow
from ..checkpoint.in_float import in_float
from ..checkpoint.load_model import load_model
from ..checkpoint.tokenized_text import load_tokenizer, packed, read_text, spread, tokenize
from ..progress import Progress
from ..trace.skeleton import has_experts

if TYPE_CHECKING:
    import numpy as np

    from ..checkpoint.checkpoint import Checkpoint

LENGTH = 512
TOKENS = 2048
"""used of a text"""
FLOOR = 1e-3
"""of the mean over all columns: a column that was silent in the text may not be silent in others"""


@dataclass(frozen=True)
class Calibration:
    """What a text says of a model's matrices.

    Attributes:
        importance: name of a parameter -> float32 `[K]`, mean square of each column of its input.
        sha256: of the text.
        tokens: used of it.
    """

    importance: dict[str, np.ndarray] = field(repr=False)
    sha256: str
    tokens: int


def calibrate(checkpoint: Checkpoint, text: Path, names: Collection[str], report: Progress) -> Calibration:
    """Run the checkpoint on a text.

    Args:
        checkpoint: with a tokenizer.
        text: a UTF-8 file; rows of 512 tokens are taken, spread over it.
        names: of the parameters whose inputs are measured.
        report: called with the rows done.

    Raises:
        GqaExportError: the text cannot be read or is shorter than a row.
        InvalidCheckpoint: there is no tokenizer.
    """
    content = read_text(text)
    ids = tokenize(load_tokenizer(checkpoint.folder), content)
    length = min(LENGTH, max(len(ids), 1))
    rows = torch.from_numpy(spread(packed(ids, length, str(text)), max(TOKENS // length, 1)).astype("int64"))
    model: Any = load_model(checkpoint, "auto")
    sums: dict[str, torch.Tensor] = {}

    def measured(name: str) -> Any:
        def hook(_: Any, given: tuple[Any, ...], *__: Any) -> None:
            _add(sums, name, given[0])

        return hook

    for path, module in model.named_modules():
        name = f"{path}.weight"
        if name in names and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(measured(name))
    stacks = _stacks(model, names)
    body = model.base_model if model.base_model is not model else model.model  # Llama 4 names another part
    head = model.get_output_embeddings()
    heads = [name for name, parameter in model.named_parameters(remove_duplicate=False) if name in names
             and head is not None and parameter is head.weight]
    if stacks and has_experts(model):
        model.set_experts_implementation("eager")  # an expert at a time: others copy a matrix for each token
    with torch.no_grad(), in_float(model), _ExpertInputs(stacks, sums):
        for place, row in enumerate(rows):
            report("running the calibration text", place, len(rows))
            hidden = body(input_ids=row[None], use_cache=False).last_hidden_state
            for name in heads:
                _add(sums, name, hidden)
    count = rows.numel()
    found = {name: (total / count).clamp_min(FLOOR * float(total.mean()) / count).float().numpy()
             for name, total in sums.items()}
    return Calibration(found, hashlib.sha256(content.encode()).hexdigest(), count)


def _stacks(model: Any, names: Collection[str]) -> dict[int, str]:
    """id -> name of each stacked weight of experts."""
    linear = {f"{path}.weight" for path, module in model.named_modules()
              if isinstance(module, torch.nn.Linear | torch.nn.Embedding)}
    return {id(parameter): name for name, parameter in model.named_parameters() if name in names and name not in linear}


class _ExpertInputs(TorchFunctionMode):
    """Inside, the inputs of products with experts are measured. stacks: by `_stacks`."""

    def __init__(self, stacks: Mapping[int, str], sums: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._stacks, self._sums = stacks, sums

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self._stacks:
            factor = factor_of(func, args, self._stacks)
            if factor is not None:
                _add(self._sums, self._stacks[factor.picked.owner], args[factor.place].movedim(factor.axis, -1))
            follow(func, args, found, self._stacks)
        return found


def _add(sums: dict[str, torch.Tensor], name: str, values: torch.Tensor) -> None:
    square = values.reshape(-1, values.shape[-1]).double().square().sum(0)
    sums[name] = sums[name] + square if name in sums else square
