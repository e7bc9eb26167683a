"""PyTorch with the weights that a quantized bundle is meant to hold: the plain model, its quantized matrices
dequantized in fp64."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..bundle.quantization import KEPT, PLAIN, Quantization, QuantizedWeight
from ..checkpoint.quantized.parameters import parameters_of
from ..errors import GqaExportError, InvalidBundle
from ..progress import silent
from ..quantized.facts import Form, dequantize_form, facts_of, float_form, nbits_form
from ..quantized.matrix import Stripe
from ..quantizing.importance import FILE, read_importance
from ..quantizing.matrices import stack_shape
from ..targets import get_target
from ..weights.dtypes import numpy_dtype
from ..weights.rows import rows_of
from ..weights.source_kinds import MemorySource

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest
    from ..checkpoint.checkpoint import Checkpoint
    from ..quantized.matrix import QuantizedMatrix
    from ..quantizing.calibrate import Calibration
    from ..targets import Target


def requantized(checkpoint: Checkpoint, manifest: Manifest, text: Path | None = None,
                folder: Path | None = None) -> dict[str, QuantizedMatrix]:
    """The matrices that the export made of a checkpoint's weights, made again. Nothing is taken from the bundle but,
    for each weight, the bits and block of the rounding, and how much errors of its columns counted: measured again, by
    other threads, that differs in its last bits, and some codes with it.

    Args:
        checkpoint: that was exported. manifest: of the bundle.
        text: the calibration text, where the export had one and the bundle does not hold what it said.
        folder: of the bundle.

    Raises:
        GqaExportError: the export had a calibration text, and it is missing or another one.
        InvalidBundle: the manifest names a weight that the checkpoint's model does not have, or the bundle says of
            other columns than it has how much they count.
    """
    from ..checkpoint.load_model import load_model
    from ..quantizing.floats import quantize_floats
    from ..quantizing.rtn import quantize_matrix

    quantization = manifest.quantization
    if quantization is None or quantization.method in KEPT:
        return {}
    importance: dict[str, Any] = {}
    if quantization.calibration and folder is not None and FILE in manifest.files:
        importance = read_importance(folder)
    elif quantization.calibration:
        importance = calibrated_again(checkpoint, quantization, text).importance
    parameters = dict(load_model(checkpoint, "float32").named_parameters(remove_duplicate=False))
    found = {}
    for weight in quantization.weights:
        if weight.operator == PLAIN or weight.kept(quantization.method):
            continue
        values = parameter_of(parameters, weight, checkpoint.source).detach()
        shape = tuple(values.shape)
        stack = stack_shape(shape, weight.experts, transposed=weight.transposed) if weight.experts else ()
        rows = rows_of(MemorySource(partial(_as_it_is, values), "float32", shape), stack, transposed=weight.transposed)
        columns, counts = (stack or shape)[-1], importance.get(weight.name)
        if counts is not None and counts.shape != (columns,):
            raise InvalidBundle(f"how much the columns of {weight.name} count has the shape {list(counts.shape)}, "
                                f"expected [{columns}]", str(folder or checkpoint.source),
                                "copy the bundle again, or export it again", code="E-BUNDLE-CALIBRATION")
        bits, block = weight.rounding
        if weight.kind != "int":
            found[weight.name] = quantize_floats(rows, (shape[0], shape[1]), weight.kind, block, weight.name, counts)
            continue
        found[weight.name] = quantize_matrix(rows, stack or shape, bits, block, weight.name, counts,
                                             bits == 8 and get_target(manifest.target).positive_scales,
                                             transposed=weight.transposed)
    return found


def _as_it_is(values: torch.Tensor) -> torch.Tensor:
    return values


def parameter_of(parameters: Mapping[str, torch.Tensor], weight: QuantizedWeight, where: str) -> torch.Tensor:
    """The parameter of a model that a manifest speaks of. where: the checkpoint, for people.

    Raises:
        InvalidBundle: there is none, or it is not the matrix or the stack of so many that the manifest says.
    """
    fix = "validate against the checkpoint that was exported"
    if weight.name not in parameters:
        raise InvalidBundle(f"the manifest names a quantized weight {weight.name}, which the checkpoint's model "
                            "does not have", where, fix, code="E-BUNDLE-QUANTIZATION")
    shape, experts = tuple(parameters[weight.name].shape), weight.experts
    fits = len(shape) == 2 and not (experts and shape[0] % experts)
    if not (fits or (experts and len(shape) == 3 and shape[0] == experts)):
        raise InvalidBundle(f"the manifest names {experts} experts in {weight.name}, whose shape in the "
                            f"checkpoint's model is {list(shape)}", where, fix, code="E-BUNDLE-QUANTIZATION")
    return parameters[weight.name]


def form_of(matrix: QuantizedMatrix, target: Target) -> Form | str:
    """How the operators of a target hold a matrix, or why they do not."""
    facts = facts_of(matrix)
    if facts.kind in target.float_codes:
        return float_form(facts)
    if target.nbits:
        return nbits_form(facts)
    return dequantize_form(facts, zeros=target.zero_points, blocks=target.quantized_blocks, columns_first=False,
                           positive=target.positive_scales)


def kept_codes(checkpoint: Checkpoint, manifest: Manifest, names: Collection[str]) -> dict[str, QuantizedMatrix]:
    """What the fp32 twin of a bundle in fewer bits holds of a checkpoint's own codes: their values. They are not
    rounded to the bundle's number format as plain weights are; scales and offsets that the graph has in it are.

    Args:
        checkpoint: that was exported. manifest: of the bundle. names: of the model's parameters.
    """
    quantization = manifest.quantization
    kept = [] if quantization is None else [each for each in quantization.weights if each.kept(quantization.method)]
    if not kept:
        return {}
    target, stored = get_target(manifest.target), parameters_of(checkpoint, names)[0]
    found = {}
    for weight in kept:
        matrix = stored.get(weight.name)
        form = None if matrix is None else form_of(matrix, target)
        if matrix is not None and isinstance(form, Form):
            found[weight.name] = as_held(matrix, form, manifest.dtype)
    return found


def as_held(matrix: QuantizedMatrix, form: Form, dtype: str) -> QuantizedMatrix:
    """A matrix with its scales and offsets rounded as a graph of a number format holds them."""
    exact_offset = not form.shift or (form.half and matrix.offset == "minimum")
    if form.kind != "int" or dtype == "float32" or (form.half and exact_offset):
        return matrix

    def rounded(values: Any) -> Any:
        return values.astype(numpy_dtype(dtype)).astype(np.float32)

    def read(start: int, stop: int) -> Stripe:
        stripe = matrix.stripe(start, stop)
        exact = stripe.scale.astype(np.float64) * matrix.global_scale
        scale = exact.astype(np.float32) if form.half else rounded(exact.astype(np.float32))
        if exact_offset:
            return replace(stripe, scale=scale)
        middle = float(1 << (matrix.bits - 1))
        offset: Any = stripe.minimum if stripe.zero is None else -stripe.zero * stripe.scale.astype(np.float64)
        offset = offset * matrix.global_scale
        shift = rounded((offset + middle * exact).astype(np.float32))
        return Stripe(stripe.codes, scale, minimum=(shift - middle * scale).astype(np.float32))

    return replace(matrix, read=read, global_scale=1.0, in_place="", scale_dtype="float32", powers=False,
                   offset=matrix.offset if exact_offset else "minimum")


def calibrated_again(checkpoint: Checkpoint, quantization: Quantization, text: Path | None) -> Calibration:
    """What the calibration text says of each matrix, measured again.

    Raises:
        GqaExportError: the text is missing, or another one.
    """
    from ..quantizing.calibrate import calibrate

    names = {weight.name for weight in quantization.weights
             if weight.operator != PLAIN and not weight.kept(quantization.method)}
    found = calibrate(checkpoint, text, names, silent) if text is not None else None
    if found is None or found.sha256 != quantization.calibration:
        problem = "none was given" if found is None else "this is another one"
        raise GqaExportError(f"the scales of this bundle were chosen with a calibration text, and {problem}",
                             str(text or "--calibrate"),
                             f"give the text with sha256 {quantization.calibration[:16]}...: --calibrate FILE",
                             code="E-VALIDATE-CALIBRATION")
    return found


def put_quantized(models: Iterable[Any], matrices: Mapping[str, QuantizedMatrix]) -> None:
    """Replace weights of models by what the matrices stand for, each in the model's own number format.

    Args:
        models: modules of transformers. Two parameters that are tied, and quantized apart, are tied no longer.
        matrices: by the parameter's name.
    """
    models = list(models)
    for model in models:
        _untie(model, matrices)
    for name, matrix in matrices.items():
        values = torch.from_numpy(matrix.parameter())
        for model in models:
            parameter = model.get_parameter(name)
            # not into its memory, which may be the checkpoint's file
            parameter.data = values.reshape(parameter.shape).to(parameter.dtype)


def _untie(model: Any, matrices: Mapping[str, QuantizedMatrix]) -> None:
    """Give every quantized parameter its own memory where it shares it with another quantized one."""
    seen: dict[int, QuantizedMatrix] = {}
    for name, matrix in matrices.items():
        parameter = model.get_parameter(name)
        known = seen.setdefault(id(parameter), matrix)
        if known is not matrix:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(parameter.detach().clone(), False))
