"""A checkpoint with fewer key/value heads: MHA -> GQA -> MQA, tensor by tensor, as an ordinary checkpoint."""

from __future__ import annotations

from .options import ConvertOptions
from .conversion import Conversion, convert, expand

__all__ = ["Conversion", "ConvertOptions", "convert", "expand"]
