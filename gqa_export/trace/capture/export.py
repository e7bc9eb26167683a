"""A wrapped decoder into onnx_ir, at opset 23: by the light capture or by torch.export. Weights are never touched."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch

from ... import graph_io
from ...errors import GqaExportError, UnsupportedModel, cause_of
from ...spec import ModelSpec
from . import capture, scalars
from .capture import Input
from .decoder_module import Decoder

OPSET = 23
logger = logging.getLogger(__name__)


def export_decoder(decoder: Decoder, spec: ModelSpec, dtype: torch.dtype, capacity: int = 0) -> tuple[ir.Model, str]:
    """Trace a wrapped decoder into an onnx_ir Model whose initializers carry the names of weights and buffers; and
    what stopped the light capture, "" if nothing did.

    By the light capture where it applies (`capture`), else by torch.export and torch.onnx: the same graph, three
    times slower. capacity: tokens of the cache, one of the lengths at which the capture is held to its assumptions.
    """
    inputs = _inputs(decoder, spec, dtype)
    outputs = [graph_io.LOGITS, *([graph_io.HIDDEN_STATES] if decoder.hidden else []),
               *[name for layer in spec.owners for name in graph_io.present_names(layer.layer)],
               *[graph_io.present_state(state) for state in spec.states]]
    stopped: Exception
    with quiet(), torch.no_grad():
        try:
            return _light(decoder, spec, inputs, outputs, capacity), ""
        except GqaExportError:
            raise
        except Exception as reason:
            # The light way uses parts of PyTorch that are not its public interface, and covers less: whatever stops
            # it, the public way decides whether this model can be traced.
            logger.debug("the light capture does not apply: %s: %s", type(reason).__name__, reason)
            stopped = reason
        try:
            return _stock(decoder, inputs, outputs), cause_of(stopped)
        except GqaExportError:
            raise
        except Exception as error:
            if isinstance(stopped, capture.NotCaptured) and str(error).startswith("Constraints violated"):
                raise UnsupportedModel(f"the model computes differently at other lengths: {stopped}",
                                       type(decoder.model).__name__, "one graph holds one way of computing; if "
                                       "config.json offers a way for all lengths (attention_type), choose it",
                                       code="E-MODEL-LENGTHS") from error
            raise UnsupportedModel(f"the model cannot be traced: {cause_of(error)}", type(decoder.model).__name__,
                                   "this architecture does something that torch.export cannot record; rerun with "
                                   "--debug for the full traceback", code="E-MODEL-TRACE") from error


def _inputs(decoder: Decoder, spec: ModelSpec, dtype: torch.dtype) -> list[Input]:
    rows, new, old = 2, 3, 5  # sizes that no constant of a model is mistaken for
    ids = torch.int64 if decoder.interface == "mask" else torch.int32
    found = [Input(graph_io.INPUT_IDS, torch.zeros(rows, new, dtype=ids), {0: "batch", 1: "new"})]
    if decoder.interface == "mask":
        found.append(Input(graph_io.ATTENTION_MASK, torch.ones(rows, old + new, dtype=torch.int64),
                           {0: "batch", 1: "total"}))
    else:
        found += [Input(graph_io.PAST_LENGTHS, torch.full((rows,), old, dtype=torch.int32), {0: "batch"}),
                  Input(graph_io.NEW_LENGTHS, torch.full((rows,), new, dtype=torch.int32), {0: "batch"})]
    for layer in spec.owners:
        for size, name in zip((layer.head_size, layer.value_head_size), graph_io.past_names(layer.layer)):
            found.append(Input(name, torch.zeros(rows, layer.kv_num_heads, old, size, dtype=dtype),
                               {0: "batch", 2: "past"}))
    found += [Input(graph_io.past_state(state), torch.zeros(rows, *state.shape), {0: "batch"}) for state in spec.states]
    return found


def _light(decoder: Decoder, spec: ModelSpec, inputs: list[Input], outputs: list[str], capacity: int) -> ir.Model:
    from . import translate

    _, table, kept = translate.library(OPSET)
    edges = {layer.window for layer in spec.layers} | {capacity} - {0}
    points = capture.sizes(bool(decoder.growing), sorted(edges), spec.max_positions)
    graph, names = capture.capture(decoder, inputs, table, kept, points)
    every = dict(decoder.named_parameters(remove_duplicate=False))
    last = {id(parameter): name for name, parameter in every.items()}  # a tied weight goes by its last name
    names = {place: last[id(every[name])] if name in every else name for place, name in names.items()}
    tensors = {**every, **dict(decoder.named_buffers())}
    scalars.keep_exact(graph.graph)
    return translate.translate(graph, names, [given.name for given in inputs], outputs, tensors, OPSET)


def _stock(decoder: Decoder, inputs: list[Input], outputs: list[str]) -> ir.Model:
    from torch.export import Dim

    from . import translate

    dims = {"batch": Dim(graph_io.BATCH, max=4096), "new": Dim(graph_io.SEQUENCE, max=1 << 20),
            "total": Dim(graph_io.TOTAL, max=1 << 21),
            "past": Dim(graph_io.PAST if decoder.growing else graph_io.CAPACITY)}
    shapes = [{place: dims[role] for place, role in given.dims.items()} for given in inputs]
    program = torch.export.export(decoder, tuple(given.example for given in inputs),
                                  dynamic_shapes=(shapes[0], tuple(shapes[1:])), strict=False)
    if scalars.keep_exact(program.graph):
        program.graph_module.recompile()
    done = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                             input_names=[given.name for given in inputs], output_names=outputs,
                             custom_translation_table=translate.own_ops())
    assert done is not None
    return done.model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings from the tracing machinery: they are about its internals, not about the user's model."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch")]
    levels = [logger.level for logger in loggers]
    # torch writes a structured log of every symbolic step for any listener, and any root handler counts as
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
