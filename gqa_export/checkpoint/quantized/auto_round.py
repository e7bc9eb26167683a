"""AutoRound in the layout of GPTQ or of AWQ, as `packing_format` says."""

from __future__ import annotations

from collections.abc import Iterator

from ...quantized.matrix import QuantizedMatrix
from ..refusals import refuse_quantized
from .awq import read_awq
from .description import Description
from .gptq import read_gptq
from .stored import Stored


def read_auto_round(description: Description, stored: Stored) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Every quantized weight by its name.

    Raises:
        InvalidCheckpoint: what the reader of the layout refuses.
        UnsupportedModel: the layout is another one.
    """
    if not stored.modules(".qweight"):
        return
    packing = description.text("packing_format", "backend")
    fields = {name: value for name, value in description.fields.items() if name != "format"}
    if "awq" in packing:
        fields |= {"version": "gemm", "zero_point": True}
        yield from read_awq(Description(description.method, fields, description.file), stored)
    elif "gptq" in packing or packing == "auto_round":
        yield from read_gptq(Description(description.method, fields, description.file), stored)
    else:
        refuse_quantized(f"AutoRound, layout {packing}", stored.where)
