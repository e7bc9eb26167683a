"""torch.export and the translation to ONNX, at opset 23. No weight is read: the traced module's are never touched."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch

from .. import cache_io
from ..errors import GqaExportError
from ..spec import ModelSpec
from . import op
from .wrapper import Decoder

OPSET = 23


def export_decoder(decoder: Decoder, spec: ModelSpec, dtype: torch.dtype):
    """Trace a wrapped decoder; returns the onnxscript ONNXProgram (its `.model` is an onnx_ir Model)."""
    from torch.export import Dim

    batch, sequence = Dim(cache_io.BATCH, max=4096), Dim(cache_io.SEQUENCE, max=1 << 20)
    total, past = Dim(cache_io.TOTAL, max=1 << 21), Dim(cache_io.PAST if decoder.growing else cache_io.CAPACITY)
    rows, new, old = 2, 3, 5  # sizes that no constant of a model is mistaken for
    ids = torch.int64 if decoder.interface == "mask" else torch.int32
    inputs: list[torch.Tensor] = [torch.zeros(rows, new, dtype=ids)]
    shapes: list[dict] = [{0: batch, 1: sequence}]
    names = [cache_io.INPUT_IDS]
    if decoder.interface == "mask":
        inputs.append(torch.ones(rows, old + new, dtype=torch.int64))
        shapes.append({0: batch, 1: total})
        names.append(cache_io.ATTENTION_MASK)
    else:
        inputs += [torch.full((rows,), old, dtype=torch.int32), torch.full((rows,), new, dtype=torch.int32)]
        shapes += [{0: batch}, {0: batch}]
        names += [cache_io.PAST_LENGTHS, cache_io.NEW_LENGTHS]
    outputs = [cache_io.LOGITS]
    for layer in spec.layers:
        for size, name in zip((layer.head_size, layer.value_head_size), cache_io.past_names(layer.layer)):
            inputs.append(torch.zeros(rows, layer.kv_num_heads, old, size, dtype=dtype))
            shapes.append({0: batch, 2: past})
            names.append(name)
        outputs += cache_io.present_names(layer.layer)
    with quiet(), torch.no_grad():
        try:
            program = torch.export.export(decoder, tuple(inputs), dynamic_shapes=(shapes[0], tuple(shapes[1:])),
                                          strict=False)
            return torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                                     input_names=names, output_names=outputs,
                                     custom_translation_table=op.translation_table())
        except GqaExportError:
            raise
        except Exception as error:
            first = str(error).strip().splitlines()
            raise GqaExportError(f"the model cannot be traced: {type(error).__name__}: {first[0] if first else ''}",
                                 type(decoder.model).__name__,
                                 "this architecture does something torch.export cannot record; rerun with --debug "
                                 "for the whole story") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings from the tracing machinery: they speak of its internals, not of the user's model."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch")]
    levels = [logger.level for logger in loggers]
    # torch writes a structured log of every symbolic step for whoever listens, and any root handler counts as
    # listening: a trace is then ten times slower (measured under pytest, which installs one).
    structured = logging.getLogger("torch.__trace")
    handlers, structured.handlers = structured.handlers, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            structured.handlers = handlers
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
