"""Whether a bundle's graph takes its weights from the files that the manifest vouches for, and only from there.

Read without the weights themselves. ONNX Runtime makes some of these checks when it opens a graph; here they are made
before anything else opens it, and held against the manifest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidBundle
from .graph_file import read_graph
from .long_facts import PREFILL
from .manifest import MODEL, Manifest

if TYPE_CHECKING:
    import onnx

NOT_SAFE = "do not use this bundle; export it again from a checkpoint you trust"


def check_graph_files(folder: Path, manifest: Manifest) -> None:
    """Check where the weights of a bundle's graph lie. Nothing to do for an engine.

    Raises:
        InvalidBundle: the graph is not an ONNX model, or a weight lies outside the manifest's files, reaches beyond
            their end or has another length than its shape.
    """
    if manifest.engine is not None:
        return
    insides = [f"{rank.folder}/" for rank in manifest.parallel.ranks] if manifest.parallel else [""]
    for inside, name in itertools.product(insides, (MODEL, *([PREFILL] if manifest.long else []))):
        place = folder / inside
        model = read_graph(place / name)
        if not model.graph.output:
            raise InvalidBundle(f"{name} is not an ONNX model: it has no outputs", str(place / name), NOT_SAFE,
                                code="E-BUNDLE-GRAPH")
        for tensor in _tensors(model):
            wrong = _wrong(tensor, manifest, inside)
            if wrong:
                raise InvalidBundle(f"the weight {tensor.name[:200]!r} {wrong}", str(place / name), NOT_SAFE,
                                    code="E-BUNDLE-WEIGHT")


def _wrong(tensor: onnx.TensorProto, manifest: Manifest, inside: str) -> str:
    """What is wrong with where a tensor's bytes are, or ""."""
    from onnx import TensorProto

    if any(size < 0 for size in tensor.dims):
        return f"has the shape {list(tensor.dims)}"
    if tensor.data_location != TensorProto.EXTERNAL:
        return ""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = inside + entries.get("location", "")
    if location not in manifest.files:
        return f"lies in {location[:200]!r}, which the manifest does not name"
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(manifest.files[location].size - offset)))
        wanted = stored_bytes(tensor)
    except (ValueError, KeyError):
        return "has an offset, length or type that cannot be read"
    if offset < 0 or length < 0 or offset + length > manifest.files[location].size:
        return f"reaches from byte {offset} to {offset + length} of {location}, which has fewer"
    return "" if length == wanted else f"of shape {list(tensor.dims)} has {length} bytes, not {wanted}"


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor in a file: two elements of four bits have one, and four of two bits."""
    from onnx import TensorProto, helper

    name, count = TensorProto.DataType.Name(tensor.data_type), math.prod(tensor.dims)
    for elements, types in ((2, ("INT4", "UINT4", "FLOAT4E2M1")), (4, ("INT2", "UINT2"))):
        if name in types:
            return -(-count // elements)
    if name == "BFLOAT16":
        return 2 * count
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers and constants, in subgraphs and functions too."""
    graphs: list[Any] = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += list(graph.node)
        else:
            for attribute in nodes.pop().attribute:
                yield from attribute.tensors
                if attribute.HasField("t"):
                    yield attribute.t
                graphs += list(attribute.graphs) + ([attribute.g] if attribute.HasField("g") else [])
