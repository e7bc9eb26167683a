"""What a LoRA adapter is, once it was read: data, and its factors on demand. `lora` reads and merges it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .safetensors_header import StoredTensor

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class LoraModule:
    """What an adapter adds to one linear module. a: [rank, in]. b: [out, rank], without `scale`."""

    name: str
    a: StoredTensor
    b: StoredTensor
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """(A, scale * B) in fp32."""
        import numpy as np

        first, second = _values(self.a), _values(self.b)
        scaled: np.ndarray = second * np.float32(self.scale)
        return first, scaled


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter's folder. name: the folder's. modules: by their names in the model."""

    folder: Path
    name: str
    modules: Mapping[str, LoraModule]

    def part(self, weights: Container[str]) -> LoraAdapter:
        """What it changes of these weights, given by name."""
        return replace(self, modules={name: module for name, module in self.modules.items()
                                      if f"{name}.weight" in weights})


def _values(tensor: StoredTensor) -> np.ndarray:
    import ml_dtypes
    import numpy as np

    kind = np.dtype(getattr(ml_dtypes, tensor.dtype) if hasattr(ml_dtypes, tensor.dtype) else tensor.dtype)
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset)
        values: np.ndarray = np.frombuffer(file.read(tensor.nbytes), kind).reshape(tensor.shape).astype(np.float32)
        return values
