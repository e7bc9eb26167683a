"""A structural hash of a canonical model: equal for two graphs that compute the same outputs the same way.

Names of intermediate values and the order of nodes do not count; ops, attributes, constants by value, and the names
of inputs and weights do. The proof that a stamped model is the fully traced one.
"""

from __future__ import annotations

import hashlib

import onnx
from onnx import TensorProto


def output_hashes(model: onnx.ModelProto) -> dict[str, str]:
    """For each graph output, by name, a hash over everything it is computed from."""
    known: dict[str, str] = {"": "absent"}
    for value in model.graph.input:
        known[value.name] = _hash("input", value.name)
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            recipe = next(entry.value for entry in tensor.external_data if entry.key == "location")
            known[tensor.name] = _hash("weight", recipe, str(tensor.data_type), str(list(tensor.dims)))
        else:
            array = onnx.numpy_helper.to_array(tensor)
            known[tensor.name] = _hash("constant", str(array.dtype), str(array.shape), array.tobytes().hex())
    for node in model.graph.node:
        attributes = sorted(attribute.SerializeToString(deterministic=True).hex() for attribute in node.attribute)
        core = _hash(node.domain, node.op_type, *attributes, *[known[name] for name in node.input])
        for place, name in enumerate(node.output):
            known[name] = _hash(core, str(place))
    return {value.name: known[value.name] for value in model.graph.output}


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()
