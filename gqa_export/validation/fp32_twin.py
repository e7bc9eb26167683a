"""The fp32 twin of a bf16 or fp16 bundle: the same graph, every low-precision tensor and type widened to fp32.

Widening is exact, so the twin computes what the bundle means, without its rounding, on runtimes that lack the
format (ONNX Runtime's CPU provider has no bf16). Weights are streamed from the bundle's data files to the twin's,
BLOCK_BYTES at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from ..bundle.graph_file import read_graph
from ..bundle.manifest import DATA, MANIFEST, MODEL, Manifest, read_manifest
from ..bundle.writer import HashingFile
from ..errors import GqaExportError, InvalidBundle, NotCheckedHere
from ..graph_io import TensorFact

BLOCK_BYTES = 1 << 24
ALIGNMENT = 64
LOW = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
TYPE_ATTRIBUTES = ("to", "dtype", "softmax_precision")
"""integer attributes of standard ops that name a tensor type"""


def write_twin(bundle: Path, folder: Path, name: str = MODEL) -> Manifest:
    """Write the fp32 twin of a bundle.

    Args:
        bundle: folder of an fp16 or bf16 bundle.
        folder: an empty folder to write into.
        name: which of the bundle's graphs; the twin holds that one alone.

    Returns:
        The twin's manifest, which names a graph for long prompts only if that is the one.

    Raises:
        InvalidBundle: the weights are cut short or lie outside the bundle.
        GqaExportError: the bundle is neither fp16 nor bf16.
        NotCheckedHere: `folder` has no room for the twin.
    """
    manifest = read_manifest(bundle)
    if manifest.dtype not in LOW:
        raise GqaExportError(f"an fp32 twin is made of an fp16 or bf16 bundle, and this one is {manifest.dtype}",
                             str(bundle), "leave out --as fp32", code="E-OPTION-AS")
    low = LOW[manifest.dtype]
    needed = 2 * sum(fact.size for fact in manifest.files.values())
    if shutil.disk_usage(folder).free < needed:
        raise NotCheckedHere(f"the fp32 twin needs {needed / 1e9:.1f} GB of temporary space", str(folder),
                             "set TMPDIR to a folder with more room", code="E-VALIDATE-SPACE")
    model = read_graph(bundle / name)
    data = HashingFile(folder / DATA)
    try:
        for tensor in _initializers(model):
            _widen_tensor(tensor, low, bundle, data)
    finally:
        fact = data.close()
    graphs = [model.graph, *_subgraphs(model.graph.node)]
    for graph in graphs:
        for value in (*graph.input, *graph.output, *graph.value_info):
            _widen_type(value.type, low)
    for function in model.functions:
        graphs += _subgraphs(function.node)
        for value in function.value_info:
            _widen_type(value.type, low)
    for nodes in (*(graph.node for graph in graphs), *(function.node for function in model.functions)):
        for node in nodes:
            _widen_attributes(node, low, bundle)
    onnx.save(model, str(folder / name))
    twin = replace(manifest, dtype="float32", long=manifest.long if name != MODEL else None,
                   inputs=_wide(manifest.inputs), outputs=_wide(manifest.outputs), files={DATA: fact})
    (folder / MANIFEST).write_text(twin.to_json(), encoding="utf-8")
    return twin


def _wide(facts: tuple[TensorFact, ...]) -> tuple[TensorFact, ...]:
    return tuple(replace(fact, dtype="float32") if fact.dtype in LOW else fact
                 for fact in facts)


def _subgraphs(nodes: Iterable[onnx.NodeProto]) -> list[onnx.GraphProto]:
    """All graphs inside the attributes of nodes, at any depth."""
    found = []
    for node in nodes:
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                found += [graph, *_subgraphs(graph.node)]
    return found


def _initializers(model: onnx.ModelProto) -> Iterator[TensorProto]:
    for graph in (model.graph, *_subgraphs(model.graph.node)):
        yield from graph.initializer


def _widen_type(type_: onnx.TypeProto, low: int) -> None:
    if type_.HasField("tensor_type") and type_.tensor_type.elem_type == low:
        type_.tensor_type.elem_type = TensorProto.FLOAT


def _widen_attributes(node: onnx.NodeProto, low: int, bundle: Path) -> None:
    for attribute in node.attribute:
        if attribute.name in TYPE_ATTRIBUTES and attribute.i == low:
            attribute.i = TensorProto.FLOAT
        for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
            if tensor.data_location == TensorProto.EXTERNAL:
                raise InvalidBundle("a constant node keeps its value in another file", f"{bundle}, node {node.name}",
                                    "export the bundle again with this version of gqa-export",
                                    code="E-BUNDLE-CONSTANT")
            _widen_inline(tensor, low)


def _widen_inline(tensor: TensorProto, low: int) -> None:
    if tensor.data_type == low:
        wide = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))


def _widen_tensor(tensor: TensorProto, low: int, bundle: Path, data: HashingFile) -> None:
    """Inline tensors stay inline; external ones are streamed into `data`, widened if they are of the low type."""
    if tensor.data_location != TensorProto.EXTERNAL:
        _widen_inline(tensor, low)
        return
    facts = {entry.key: entry.value for entry in tensor.external_data}
    source, where = bundle / facts["location"], f"{bundle}, tensor {tensor.name}"
    if not source.resolve().is_relative_to(bundle.resolve()):
        raise InvalidBundle(f"the data file {facts['location']} lies outside the bundle", where,
                            "do not use this bundle; export it again", code="E-BUNDLE-OUTSIDE")
    data.write(b"\0" * (-data.tell() % ALIGNMENT))
    start, left = data.tell(), int(facts.get("length", source.stat().st_size - int(facts.get("offset", 0))))
    with source.open("rb") as file:
        file.seek(int(facts.get("offset", 0)))
        while left:
            block = file.read(min(BLOCK_BYTES, left))
            if not block:
                raise InvalidBundle(f"{facts['location']} ends {left} bytes before the end of this tensor", where,
                                    "copy or export the bundle again", code="E-BUNDLE-SHORT")
            left -= len(block)
            data.write(_widen_bytes(block, tensor.data_type) if tensor.data_type == low else block)
    if tensor.data_type == low:
        tensor.data_type = TensorProto.FLOAT
    del tensor.external_data[:]
    for key, value in (("location", DATA), ("offset", start), ("length", data.tell() - start)):
        tensor.external_data.add(key=key, value=str(value))


def _widen_bytes(block: bytes, low: int) -> bytes:
    if low == TensorProto.FLOAT16:
        return np.frombuffer(block, "<f2").astype("<f4").tobytes()
    return (np.frombuffer(block, "<u2").astype("<u4") << np.uint32(16)).tobytes()
