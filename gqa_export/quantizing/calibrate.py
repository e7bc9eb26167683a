"""How large the inputs of each matrix are for a text: the mean square of every column, with which errors are weighed,
and the largest value of all, by which inputs are rounded.

One pass over the text, row by row, in fp32; weights are read when their layer runs.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ..checkpoint.expert_products import factor_of, follow
from ..checkpoint.in_float import in_float
from ..checkpoint.load_config import load_config
from ..checkpoint.load_model import load_model
from ..checkpoint.tokenized_text import load_tokenizer, packed, read_beginning, spread, tokenize
from ..errors import GqaExportError, UnsupportedModel
from ..progress import Progress
from ..trace.probe.rotary import longest
from ..trace.skeleton import has_experts

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

LENGTH = 512
LEAST_LENGTH = 8
LEAST_TOKENS = 32
"""of a text: with fewer the columns of a matrix count by chance"""
TOKENS = 2048
"""used of a text"""
APART = 1024
"""tokens of a text that are kept apart at most, to measure on"""
FLOOR = 1e-3
"""of the mean over all columns: a column that was silent in the text may not be silent in others"""


@dataclass(frozen=True)
class Calibration:
    """What a text says of a model's matrices.

    Attributes:
        importance: name of a parameter -> float32 `[K]`, mean square of each column of its input.
        sha256: of the text.
        tokens: used of it.
        largest: name of a parameter -> largest absolute value of its input; stacked experts are not here.
    """

    importance: dict[str, np.ndarray] = field(repr=False)
    sha256: str
    tokens: int
    largest: dict[str, float] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class TextRows:
    """Tokens of a text. statistics, apart: int64 `[rows, length]`; no token is in both. sha256: of the whole text."""

    statistics: torch.Tensor
    apart: torch.Tensor
    sha256: str


def rows_of_text(checkpoint: Checkpoint, text: Path, *, hold_out: bool = False) -> TextRows:
    """The tokens of a text that are used: rows of 512 tokens (of fewer, where the model has fewer positions or the text
    is short), spread over it, of a very long one over its first `MOST_CHARACTERS`.

    Args:
        checkpoint: with a tokenizer.
        text: a UTF-8 file.
        hold_out: keep rows apart, to measure on.

    Raises:
        GqaExportError: the text cannot be read, or is shorter than it must be.
        InvalidCheckpoint: there is no tokenizer.
    """
    content = read_beginning(text)
    ids = tokenize(load_tokenizer(checkpoint.folder, checkpoint.gguf_file), content.text)
    if len(ids) < LEAST_TOKENS:
        raise GqaExportError(f"the text has {len(ids)} tokens; to weigh errors by it takes at least {LEAST_TOKENS}",
                             str(text), "give a longer text, better of some thousand tokens", code="E-FILE-TEXT-SHORT")
    positions = longest(load_config(checkpoint).get_text_config()) or LENGTH
    length = min(LENGTH, positions, max(len(ids), 1))
    apart = np.zeros(0, int)
    if hold_out:
        length = min(length, len(ids) // 3)
        if length < LEAST_LENGTH:
            raise GqaExportError(
                f"the text has {len(ids)} tokens; to measure on some of them, and to choose with others, it needs more",
                str(text),
                f"give a text of at least {3 * LEAST_LENGTH} tokens, better of some thousands",
                code="E-FILE-TEXT-SHORT",
            )
    rows = packed(ids, length, str(text))
    if hold_out:
        count = max(min(APART // length, len(rows) // 3), 1)
        apart = ((np.arange(count) + 0.5) * len(rows) / count).astype(int)
    used = np.setdiff1d(np.arange(len(rows)), apart)
    statistics = spread(rows[used], max(TOKENS // length, 1))
    chosen, held = (torch.from_numpy(each.astype(np.int64)) for each in (statistics, rows[apart]))
    return TextRows(chosen, held, content.sha256)


def calibrate(checkpoint: Checkpoint, text: Path | TextRows, names: Collection[str], report: Progress) -> Calibration:
    """Run the checkpoint on a text.

    Args:
        checkpoint: that is quantized.
        text: a file, or its tokens: see `rows_of_text`, which says what is raised.
        names: of the parameters whose inputs are measured.
        report: called with the rows done.

    Raises:
        UnsupportedModel: inputs of a matrix are not finite.
    """
    text = text if isinstance(text, TextRows) else rows_of_text(checkpoint, text)
    rows = text.statistics
    model: Any = load_model(checkpoint, "auto")
    sums: dict[str, torch.Tensor] = {}
    largest: dict[str, float] = {}

    def measure(name: str, values: torch.Tensor) -> None:
        _add(sums, name, values)
        if values.numel():  # an expert that is a module of its own gets no rows where no token chose it
            low, high = (float(each) for each in torch.aminmax(values))
            largest[name] = max(largest.get(name, 0.0), -low, high)

    def measured(name: str) -> Any:
        def hook(_: Any, given: tuple[Any, ...], *__: Any) -> None:
            measure(name, given[0])

        return hook

    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if name in names and isinstance(module, torch.nn.Linear) and module is not head:
            module.register_forward_pre_hook(measured(name))
    stacks = _stacks(model, names)
    body = model.base_model if model.base_model is not model else model.model  # Llama 4 names another part
    heads = [name for name, parameter in model.named_parameters(remove_duplicate=False) if name in names
             and head is not None and parameter is head.weight]
    if heads:
        # what the model hands its head need not be the last hidden state: Inkling and MiniCPM divide it
        def measure_head(_: Any, given: tuple[Any, ...]) -> None:
            for name in heads:
                measure(name, given[0])
            raise _AtHead

        head.register_forward_pre_hook(measure_head)
        body = model
    if stacks and has_experts(model):
        model.set_experts_implementation("eager")  # an expert at a time: others copy a matrix for each token
    with torch.no_grad(), in_float(model), _ExpertInputs(stacks, sums):
        for place, row in enumerate(rows):
            report("running the calibration text", place, len(rows))
            with suppress(_AtHead):
                body(input_ids=row[None], use_cache=False)
    count = rows.numel()
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            raise UnsupportedModel(f"the inputs of {name} are not finite numbers when the model reads the text",
                                   checkpoint.source, "check the checkpoint: its own logits would be NaN",
                                   code="E-MODEL-QUANTIZE-VALUE")
    found = {name: (total / count).clamp_min(FLOOR * float(total.mean()) / count).float().numpy()
             for name, total in sums.items()}
    del model, body, head, module, stacks
    gc.collect()  # hooks and modules refer to one another, and an export does not collect by itself
    return Calibration(found, text.sha256, count, largest)


class _AtHead(Exception):
    """The model is about to compute logits, which take more memory than all else and are not used."""


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
