"""Products whose inputs `--activations same` rounds, and a graph and its manifest do not: such a bundle is nearer to
the reference, so that no number tells. The checkpoint's own scales do, or the bundle's record of the calibration text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.quantization import KEPT, PLAIN
from ..checkpoint.quantized.parameters import parameters_of
from ..errors import InvalidBundle
from ..quantized.facts import facts_of
from ..quantized.input_codes import InputCodes, input_codes, scale_of
from ..quantizing.importance import FILE, read_largest
from ..targets import get_target
from .input_codes import SAME

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest
    from ..checkpoint.checkpoint import Checkpoint
    from ..quantized.matrix import QuantizedMatrix


def check_exact_inputs(checkpoint: Checkpoint, manifest: Manifest, model: Any,
                       matrices: Mapping[str, QuantizedMatrix], folder: Path | None) -> None:
    """Hold the inputs that a manifest says are not rounded against what the export would have rounded.

    Args:
        checkpoint: that was exported. manifest: of the bundle. model: of the checkpoint.
        matrices: that the export made of the checkpoint's weights; none where it kept them.
        folder: of the bundle, which may hold how large inputs were. None: that is not known.

    Raises:
        InvalidBundle: there is a scale for the inputs of a weight, and codes that TensorRT multiplies.
    """
    quantization = manifest.quantization
    if quantization is None or quantization.activations != SAME:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    looked_up, kinds = model.get_input_embeddings().weight, get_target(manifest.target).input_codes
    exact = {weight.name: weight for weight in quantization.weights
             if not weight.inputs and weight.operator != PLAIN and weight.kind in kinds
             and parameters.get(weight.name) is not looked_up}
    if not exact:
        return
    if quantization.method in KEPT:
        matrices = parameters_of(checkpoint, parameters)[0]
        scales = {name: matrix.input_scale for name, matrix in matrices.items()}
    else:
        largest = read_largest(folder) if folder is not None and FILE in manifest.files else {}
        scales = {name: scale_of(largest[name], weight.kind) for name, weight in exact.items() if name in largest}
    for name in exact:
        codes = input_codes(facts_of(matrices[name]), scales.get(name), manifest.dtype) if name in matrices else ""
        if isinstance(codes, InputCodes):
            raise InvalidBundle(f"the manifest says that products with {name} do not round their inputs "
                                f"({exact[name].inputs_reason}), and there is a scale for them, {codes.scale:.6g}",
                                checkpoint.source,
                                "validate against the checkpoint that was exported, or export it again",
                                code="E-BUNDLE-QUANTIZATION")
