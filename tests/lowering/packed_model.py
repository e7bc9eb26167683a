"""A lowered graph of one quantized weight `w`, written with the bytes of its codes, for ONNX Runtime to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from gqa_export.weights.packed import add_packed
from gqa_export.weights.source_kinds import DequantizedSource
from gqa_export.weights.sources import WeightStore

from .test_quantized import write_part


def write_packed(lowered: onnx.ModelProto, matrix: Any, context: Any, folder: Path) -> Path:
    """`m.onnx` and `data` in a folder; gives the former. context: of the passes that lowered the graph."""
    store = WeightStore({"w": DequantizedSource(matrix)})
    add_packed(store, {"w": matrix}, {name: held.parts for name, held in context.held.items()})
    with open(folder / "data", "wb") as file:
        for tensor in lowered.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                write_part(tensor, store, file)
    onnx.save(lowered, folder / "m.onnx")
    return folder / "m.onnx"
