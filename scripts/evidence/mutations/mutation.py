"""Breaks a good bundle on purpose, as exporters have broken theirs, to show what the suite catches.

A mutation changes the graph or the weights of a copy; then the manifest is made to agree again (hashes, sizes, the
layers' scale, softcap and window), so that nothing but the behaviour is wrong. `Contradiction`s are the opposite:
behaviour aside, files or graph differ from the manifest. Dimensions as in `gqa_export.attention_op`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gqa_export.bundle.attention_claims import attention_facts
from gqa_export.bundle.manifest import MANIFEST, MODEL, FileFact, Manifest, read_manifest
from gqa_export.files.sha256 import file_sha256
from gqa_export.graph_io import present_names


class NotHere(Exception):
    """This model has nothing that the mutation could break."""


@dataclass(frozen=True)
class Mutation:
    """One way to break a bundle. place: the layer (-1: none in particular) and the op whose output is first wrong, as
    `bisect` names it. words: the pattern that `bisect` may name. whole: no single layer is to blame."""

    name: str
    breaks: str
    change: Callable[[Broken], None]
    layer: int = 1
    ops: tuple[str, ...] = ()
    words: str = ""


@dataclass
class Broken:
    """A copy of a bundle being broken."""

    folder: Path
    manifest: Manifest
    model: onnx.ModelProto

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """The graph's nodes."""
        return list(self.model.graph.node)

    def attention(self, layer: int) -> onnx.NodeProto:
        """The node that writes a layer's present key."""
        return self.maker(present_names(layer)[0])

    def maker(self, tensor: str) -> onnx.NodeProto:
        """The node that makes a tensor. NotHere if none does."""
        for node in self.model.graph.node:
            if tensor in node.output:
                return node
        raise NotHere(tensor)

    def node(self, *parts: str, op: str = "") -> onnx.NodeProto:
        """The first node whose name holds every part, of that op type if given. NotHere if there is none."""
        for node in self.model.graph.node:
            if all(part in node.name for part in parts) and op in ("", node.op_type):
                return node
        raise NotHere(" ".join(parts))

    def attribute(self, node: onnx.NodeProto, *names: str) -> onnx.AttributeProto:
        """The first of these attributes that the node has."""
        for attribute in node.attribute:
            if attribute.name in names:
                return attribute
        raise NotHere(names[0])

    def weight_name(self, *parts: str) -> str:
        """The first initializer whose name holds every part."""
        for tensor in self.model.graph.initializer:
            if all(part in tensor.name for part in parts):
                return tensor.name
        raise NotHere(" ".join(parts))

    def read(self, name: str) -> np.ndarray:
        """A weight's values, as a copy."""
        tensor = self._tensor(name)
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor).copy()
        facts = {entry.key: entry.value for entry in tensor.external_data}
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.fromfile(self.folder / facts["location"], dtype, int(np.prod(tensor.dims)),
                           offset=int(facts.get("offset", 0))).reshape(tensor.dims)

    def write(self, name: str, values: np.ndarray) -> None:
        """Replace a weight's values by others of the same shape."""
        tensor = self._tensor(name)
        values = np.ascontiguousarray(values, helper.tensor_dtype_to_np_dtype(tensor.data_type))
        if tensor.data_location != TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(values, name))
            return
        facts = {entry.key: entry.value for entry in tensor.external_data}
        with (self.folder / facts["location"]).open("r+b") as file:
            file.seek(int(facts.get("offset", 0)))
            file.write(values.tobytes())

    def after(self, tensor: str, op: str, inputs: list[str], attributes: dict | None = None, *,
              domain: str = "") -> onnx.NodeProto:
        """Put a node behind `tensor`: every reader, and the graph's output of that name, gets the new node's output.
        inputs: "" stands for the tensor itself."""
        before, scope = f"{tensor}/unbroken", self.maker(tensor).name
        for node in self.model.graph.node:
            for place, name in enumerate(node.output):
                if name == tensor:
                    node.output[place] = before
        made = helper.make_node(op, [name or before for name in inputs], [tensor], name=f"{scope}/broken/{op}",
                                domain=domain, **(attributes or {}))
        nodes = list(self.model.graph.node)
        place = next(i for i, node in enumerate(nodes) if before in node.output)
        self.model.graph.node.insert(place + 1, made)
        return self.model.graph.node[place + 1]

    def before(self, node: onnx.NodeProto, *made: onnx.NodeProto) -> None:
        """Insert nodes, in this order, before one of the graph's."""
        place = next(i for i, each in enumerate(self.model.graph.node) if each is node or each == node)
        for number, one in enumerate(made):
            one.name = f"{node.name}/{one.op_type}_{number}"  # a graph's nodes carry the scope they belong to
            self.model.graph.node.insert(place + number, one)

    def constant(self, name: str, values: np.ndarray) -> str:
        """A new initializer; returns its name."""
        self.model.graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def _tensor(self, name: str) -> TensorProto:
        return next(tensor for tensor in self.model.graph.initializer if tensor.name == name)


def break_bundle(bundle: Path, folder: Path, change: Callable[[Broken], None]) -> Path:
    """Copy `bundle` into the new `folder`, break it there, and let its manifest agree. NotHere: nothing to break."""
    shutil.copytree(bundle, folder)
    broken = Broken(folder, read_manifest(folder), onnx.load(str(folder / MODEL), load_external_data=False))
    change(broken)
    _raise_opset(broken.model)
    onnx.save(broken.model, str(folder / MODEL))
    facts = attention_facts(broken.model, broken.manifest.kv_cache)
    layers = tuple(replace(layer, **facts.get(layer.layer, {})) for layer in broken.manifest.spec.layers)
    sign(folder, replace(broken.manifest, spec=replace(broken.manifest.spec, layers=layers)))
    return folder


def _raise_opset(model: onnx.ModelProto) -> None:
    """The nodes that damage puts in are written for opset 18; those of the graph mean the same there."""
    for imports in (model.opset_import, *(function.opset_import for function in model.functions)):
        for entry in imports:
            if entry.domain in ("", "ai.onnx"):
                entry.version = max(entry.version, 18)


def sign(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` with the sizes and hashes that its files have now."""
    files = {name: FileFact((folder / name).stat().st_size, file_sha256(folder / name)) for name in manifest.files}
    (folder / MANIFEST).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
