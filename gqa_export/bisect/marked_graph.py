"""A bundle's graph with every layer fed from outside and every activation of the layers shown.

Node names carry the module scope (`model.layers.3.self_attn/...`), which tells the layer. What a layer takes over
from the one before is the residual stream, in one tensor or, after fusions, in several that are added: the first is
replaced by an input `forced.{layer}.0`, the others by inputs that are fed zeros. Dimensions as in
`gqa_export.attention_op`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ..bundle.graph_file import read_graph
from ..bundle.manifest import MODEL
from ..errors import GqaExportError
from ..graph_io import EXACT_PRODUCTS, present_names

FLOATS = (np.float32, np.float64)


@dataclass
class Marked:
    """model: all activations are outputs. carried: per layer (and last, the model's end) the tensors that carry the
    residual stream into it. attention: per layer the output of its attention node. owned: per layer its tensors."""

    model: onnx.ModelProto
    carried: list[list[str]]
    attention: dict[int, str]
    owned: dict[int, list[str]]
    forced: dict[str, int] = field(default_factory=dict)
    """input -> layer; only the first of each layer is fed anything but zeros"""


def mark(folder: Path, prefix: str, layers: int) -> Marked:
    """Read a bundle's graph and show the activations of its layers. prefix: the module path of the layers' list.

    Raises GqaExportError where the node names do not tell the layers.
    """
    model = read_graph(folder)
    graph = model.graph
    pattern = re.compile(rf"(?:^|/){re.escape(prefix)}\.(\d+)(?=[./])")
    layer_of = [int(found[1]) if (found := pattern.search(node.name)) else -1 for node in graph.node]
    fixed = {tensor.name for tensor in graph.initializer}
    owner: dict[str, int] = {}
    owned: dict[int, list[str]] = {number: [] for number in range(layers)}
    for number, node in zip(layer_of, graph.node):
        if all(name in fixed or not name for name in node.input):
            fixed.update(node.output)  # made of weights alone
            continue
        for name in filter(None, node.output):
            owner[name] = number
            if number >= 0:
                owned[number].append(name)
    if not all(owned.values()):
        missing = [number for number, names in owned.items() if not names]
        raise GqaExportError(f"bisect tells layers by the names of nodes, and none is named after layer {missing[0]}",
                             f"{folder / MODEL}, {prefix}",
                             "use `gqa-export validate`; a graph without module scopes cannot be bisected",
                             code="E-VALIDATE-BISECT-NAMES")
    carried: list[list[str]] = [[] for _ in range(layers + 1)]
    attention: dict[int, str] = {}
    for number, node in zip(layer_of, graph.node):
        place = number if number >= 0 else layers
        for name in node.input:
            from_outside = name in owner and owner[name] != number
            # the model's end takes over from the last layers only; what shared nodes read is not the residual stream
            if from_outside and (number >= 0 or owner[name] >= 0) and name not in carried[place]:
                carried[place].append(name)
        if number >= 0 and "Attention" in node.op_type:
            attention[number] = node.output[0]
    return Marked(model, carried, attention, owned)


def keep_residual(marked: Marked, shapes: dict[str, tuple[int, ...]], rows: tuple[int, int, int]) -> None:
    """Of what is carried, keep what has the shape [B, S, hidden] of the residual stream."""
    marked.carried = [[name for name in names if shapes.get(name) == rows] for names in marked.carried]


def show_all(marked: Marked) -> onnx.ModelProto:
    """A copy of the model whose outputs are all activations of the layers and all that is carried."""
    model = onnx.ModelProto()
    model.CopyFrom(marked.model)
    shown = {port.name for port in model.graph.output}
    wanted = [name for names in (*marked.owned.values(), *marked.carried) for name in names]
    for name in dict.fromkeys(wanted):
        if name not in shown:
            model.graph.output.append(helper.make_empty_tensor_value_info(name))
    return model


def force(marked: Marked, element: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    """The model with every layer, and the model's end, cut off from the one before."""
    model = show_all(marked)
    graph, shown = model.graph, marked.owned
    layer_of = {name: number for number, names in shown.items() for name in names}
    for place, names in enumerate(marked.carried):
        for number, name in enumerate(names):
            new = f"forced.{place}.{number}"
            marked.forced[new] = place
            graph.input.append(helper.make_tensor_value_info(new, element, [None, None, None]))
            for node in graph.node:
                inside = any(layer_of.get(out, -1) == place for out in node.output)
                end = place == len(marked.carried) - 1 and not any(out in layer_of for out in node.output)
                if inside or end:
                    for position, read in enumerate(node.input):
                        if read == name:
                            node.input[position] = new
    return model


def present_of(layer: int) -> tuple[str, str]:
    """Names of a layer's present key and value."""
    return present_names(layer)


def open_graph(model: onnx.ModelProto, folder: Path) -> Any:
    """A session over a changed graph whose weights stay in the bundle's folder."""
    from ..runtime.ort.loading import import_onnxruntime

    ort: Any = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    for key, value in EXACT_PRODUCTS.items():
        options.add_session_config_entry(key, value)
    # as it is written: a fusion of ONNX Runtime's would hide what is looked for
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: Any, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs, by name."""
    names = [port.name for port in session.get_outputs()]
    wanted = {port.name for port in session.get_inputs()}
    return dict(zip(names, session.run(names, {name: feed[name] for name in wanted})))
