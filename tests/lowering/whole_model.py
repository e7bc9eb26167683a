"""Tiny models through trace and lowering, run in ONNX Runtime, beside the same checkpoint in transformers, fp64.

Dimensions as in `gqa_export.attention_op`. The truth of a row is that row alone, unpadded, in one pass without a cache.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gqa_models
import numpy as np
import onnx
import onnxruntime
import torch
import transformers

from gqa_export import graph_io
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.prepare import traced_model
from gqa_export.graph.match import RECIPE
from gqa_export.lowering.context import Lowered, LowerOptions
from gqa_export.lowering.lower import lower
from gqa_export.progress import silent
from gqa_export.runtime.feeds import attention_mask
from gqa_export.spec import ModelSpec
from gqa_export.targets import get_target

CAPACITY = 128
"""that of most tests that export: the traces are the same, and kept for the whole run"""

Overrides = tuple[tuple[str, Any], ...]


def checkpoint(name: str, overrides: Overrides = ()) -> Path:
    """The folder of a tiny checkpoint, written once a process."""
    return _checkpoint(name, overrides)


def canonical(name: str, mode: str = "growing", overrides: Overrides = (), dtype: str = "float32",
              logits: str = "all") -> tuple[onnx.ModelProto, ModelSpec]:
    """The canonical model and spec of a tiny checkpoint, traced once a run (see `trace_cache`)."""
    return _canonical(name, mode, overrides, dtype, logits)


def lowered(name: str, target: str, mode: str = "growing", packed: bool = True, overrides: Overrides = (),
            dtype: str = "float32", logits: str = "all") -> Lowered:
    """That model in the dialect of a target."""
    return _lowered(name, target, mode, packed, overrides, dtype, logits)


def eager(name: str, overrides: Overrides = ()) -> torch.nn.Module:
    """The checkpoint in transformers, eager attention, fp64."""
    return _eager(name, overrides)


@cache  # functools.cache tells f(1) from f(a=1): hence positional arguments only, all given
def _checkpoint(name: str, overrides: Overrides) -> Path:
    return gqa_models.write_tiny(name, Path(mkdtemp(prefix=f"gqa-{name}-")), **dict(overrides))


@cache
def _canonical(name: str, mode: str, overrides: Overrides, dtype: str, logits: str):
    options = ExportOptions("ort", cache=mode, capacity=CAPACITY, logits=logits)
    found = open_checkpoint(checkpoint(name, overrides))
    traced, _, _ = traced_model(found, options, dtype, get_target("ort"), silent)
    return traced.model, traced.spec


@cache
def _lowered(name: str, target: str, mode: str, packed: bool, overrides: Overrides, dtype: str, logits: str) -> Lowered:
    model, spec = canonical(name, mode, overrides, dtype, logits)
    return lower(model, spec, LowerOptions(target, mode, CAPACITY, logits, packed=packed))


@cache
def _eager(name: str, overrides: Overrides) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(name, overrides), dtype=torch.float64,
                                                              attn_implementation="eager",
                                                              experts_implementation="eager")
    return model.eval()


def truth(model: torch.nn.Module, row: list[int]) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Logits [S, V] of one row and every layer's keys and values [K, S, D]."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([row]), past_key_values=transformers.DynamicCache(), use_cache=True)
    return out.logits[0].numpy(), [(layer.keys[0].numpy(), layer.values[0].numpy())
                                   for layer in out.past_key_values.layers]


def with_weights(model: onnx.ModelProto, module: torch.nn.Module) -> onnx.ModelProto:
    """A copy in which every recipe is filled from the module, inline."""
    filled, state = onnx.ModelProto(), module.state_dict()
    filled.CopyFrom(model)
    for tensor in filled.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next(entry.value for entry in tensor.external_data if entry.key == "location")
        parts = [state[name].numpy() for name in location.removeprefix(RECIPE).split("+")]
        values = np.concatenate(parts).astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        assert values.shape == tuple(tensor.dims)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return filled


class Decoder:
    """A lowered model in ONNX Runtime with its cache: `step` appends tokens to every row."""

    def __init__(self, model: onnx.ModelProto, spec: ModelSpec, mode: str, batch: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options,
                                                    providers=["CPUExecutionProvider"])
        self.spec, self.mode = spec, mode
        self.lengths = np.zeros(batch, np.int64)
        axis, self.past = 0 if mode == "growing" else CAPACITY, {}
        dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[self.session.get_inputs()[2].type]
        for layer in spec.layers:
            for cached, size in zip(graph_io.past_names(layer.layer), (layer.head_size, layer.value_head_size)):
                self.past[cached] = np.zeros((batch, layer.kv_num_heads, axis, size), dtype)

    def step(self, rows: list[list[int]], mask: np.ndarray | None = None) -> np.ndarray:
        """Logits [B, S, V] of new tokens, padded on the right. mask: another one than the honest one."""
        new = np.array([len(row) for row in rows])
        width = int(new.max())
        ids = np.array([row + [0] * (width - len(row)) for row in rows], np.int64)
        past = int(self.lengths.max()) if self.mode == "static" else next(iter(self.past.values())).shape[2]
        if mask is None:
            mask = attention_mask(self.lengths, new, past, width)
        names = [output.name for output in self.session.get_outputs()]
        feeds = {graph_io.INPUT_IDS: ids, graph_io.ATTENTION_MASK: mask, **self.past}
        found = dict(zip(names, self.session.run(None, feeds)))
        for layer in self.spec.layers:
            for before, after in zip(graph_io.past_names(layer.layer), graph_io.present_names(layer.layer)):
                self.past[before] = found[after]
        self.lengths = self.lengths + new
        return found[graph_io.LOGITS]
