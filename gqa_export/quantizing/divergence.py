"""How far rounding weights moves a model's predictions on a text: the KL divergence, measured by running both.

PyTorch, in fp32, row by row. Rounded weights are made when the module that has them runs, and are gone after it: the
memory is that of one matrix. The predictions of the model as it is are kept in a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checkpoint.in_float import in_float
from ..checkpoint.load_model import load_model
from ..errors import InvalidCheckpoint
from ..trace.skeleton import has_experts

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint
    from ..quantized.matrix import QuantizedMatrix

PIECE = 64
"""tokens whose predictions are compared at once"""


class Divergence:
    """A model's predictions of the tokens of a text, and those of it with other weights.

    Args:
        checkpoint: of the model.
        rows: int64 `[rows, length]`, the tokens.
        folder: for the file of predictions.

    Raises:
        InvalidCheckpoint: the model's own predictions are not finite.
    """

    def __init__(self, checkpoint: Checkpoint, rows: torch.Tensor, folder: Path) -> None:
        self.rows, self._folder = rows, folder
        model: Any = load_model(checkpoint, "auto")
        if has_experts(model):
            model.set_experts_implementation("eager")  # an expert at a time: others copy a matrix for each token
        self._model = model
        self._ran: set[int] = set()
        hooks = [
            module.register_forward_hook(lambda module, *_: self._ran.add(id(module)))
            for module in self._model.modules()
        ]
        for number, row in enumerate(rows):
            predicted = self._predictions(row)
            if not torch.isfinite(predicted).all():
                raise InvalidCheckpoint(
                    "the model's own logits are NaN or infinite",
                    checkpoint.source,
                    "check its weights; there is nothing to measure against",
                    code="E-CKPT-NAN",
                )
            predicted.numpy().tofile(self._folder / str(number))
        for hook in hooks:
            hook.remove()

    @property
    def tokens(self) -> int:
        """Predictions that are compared."""
        return self.rows.numel()

    def of(self, matrices: Mapping[str, QuantizedMatrix]) -> float:
        """The mean KL divergence, in nats, of the predictions with these weights from the model's own.

        Args:
            matrices: name of a parameter -> what it is rounded to.
        """
        total = 0.0
        with _rounded(self._model, matrices, self._ran):
            for number, row in enumerate(self.rows):
                got = self._predictions(row)
                expected = torch.from_numpy(np.fromfile(self._folder / str(number), np.float32)).reshape(got.shape)
                for start in range(0, len(got), PIECE):
                    a, b = expected[start : start + PIECE], got[start : start + PIECE]
                    total += float((a.exp() * (a - b)).sum(-1).double().sum())
        kl = total / self.tokens
        return max(kl, 0.0) if np.isfinite(kl) else float("inf")

    def _predictions(self, row: torch.Tensor) -> torch.Tensor:
        """Logarithms of probabilities, fp32 `[length, vocabulary]`."""
        with torch.no_grad(), in_float(self._model):
            logits = self._model(input_ids=row[None], use_cache=False).logits[0].float()
            return logits.sub_(logits.logsumexp(-1, keepdim=True))


@contextmanager
def _rounded(model: Any, matrices: Mapping[str, QuantizedMatrix], ran: set[int]) -> Iterator[None]:
    """Inside, parameters of a model are what the matrices stand for. ran: ids of the modules that a step calls; a
    parameter of another one is rounded the whole time."""
    hooks, kept = [], []
    for name, matrix in matrices.items():
        parameter = model.get_parameter(name)
        owners = [
            module for module in model.modules() if any(each is parameter for each in module._parameters.values())
        ]
        kept.append((parameter, parameter.data))
        if not all(id(owner) in ran for owner in owners):
            parameter.data = _values(matrix).to(parameter.dtype)
            continue

        def put(_: Any, __: Any, parameter: Any = parameter, matrix: QuantizedMatrix = matrix) -> None:
            parameter.data = _values(matrix)

        def restore(_: Any, __: Any, ___: Any, parameter: Any = parameter, stored: Any = parameter.data) -> None:
            parameter.data = stored

        for owner in owners:
            hooks += [owner.register_forward_pre_hook(put), owner.register_forward_hook(restore)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in kept:
            parameter.data = data


def _values(matrix: QuantizedMatrix) -> torch.Tensor:
    """What a matrix of symmetric codes stands for, float32."""
    values: Any = (
        np.empty((matrix.rows, matrix.blocks, matrix.block), np.float32)
        if matrix.columns == matrix.blocks * matrix.block
        else None
    )
    if values is None:
        return torch.from_numpy(matrix.parameter().astype(np.float32))
    for start, stop in matrix.stripes():
        found = matrix.stripe(start, stop)
        np.multiply(
            found.codes.reshape(-1, matrix.blocks, matrix.block), found.scale[..., None], out=values[start:stop]
        )
    return torch.from_numpy(values.reshape(matrix.shape))
