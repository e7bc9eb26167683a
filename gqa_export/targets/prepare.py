"""onnxscript's rules over a model whose weights are graph inputs meanwhile, so that no rule can read or fold one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx


def with_onnx_ir(model: onnx.ModelProto, work: Callable[[Any], Any]) -> onnx.ModelProto:
    """A copy of `model` after `work(onnx_ir Model)`. Weights stay recipes; the order of real inputs is kept."""
    from onnx_ir import serde

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = [t for t in copy.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inline = [t for t in copy.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(inline)
    inputs = len(copy.graph.input)
    for tensor in weights:
        copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    graph = serde.deserialize_model(copy)
    work(graph)
    done = serde.serialize_model(graph)
    del done.graph.input[inputs:]
    read = {name for node in done.graph.node for name in node.input}
    done.graph.initializer.extend(tensor for tensor in weights if tensor.name in read)
    return done


