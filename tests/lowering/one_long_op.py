"""A model that is one call of `gqa::LongGroupedQueryAttention`, with its function body, for ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from gqa_export import long_attention_op as contract
from gqa_export.long_attention_op import LongSetting
from gqa_export.lowering.long_function import REQUIRED, attach_long_function

TYPES = {"int32": TensorProto.INT32, "int64": TensorProto.INT64, "float32": TensorProto.FLOAT}


def model(setting: LongSetting, heads: int, kv_heads: int, size: int, value_size: int, *, softcap: float = 0.0,
          window: int = 0, growing: int = 1, element: int = TensorProto.FLOAT, opset: int = 23) -> onnx.ModelProto:
    """The model; its inputs are those of the op without cos and sin."""
    fixed = {"D": size, "E": value_size, "K": kv_heads, "H": heads, "H*D": heads * size, "K*D": kv_heads * size,
             "K*E": kv_heads * value_size, "H*E": heads * value_size}

    def info(port: Any) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(port.name, TYPES.get(port.type, element),
                                             [fixed.get(letter, letter) for letter in port.shape])

    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": size**-0.5, "softcap": softcap,
                  "window": window, "rotary_interleaved": 0, "growing": growing, **setting.attributes()}
    node = helper.make_node(contract.OP, [name if name in REQUIRED else "" for name in contract.INPUT_NAMES],
                            contract.OUTPUT_NAMES, name="long", domain=contract.DOMAIN, **attributes)
    graph = helper.make_graph([node], "one_op", [info(port) for port in contract.INPUTS if port.name in REQUIRED],
                              [info(port) for port in contract.OUTPUTS])
    made = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)])
    attach_long_function(made)
    return made


def session(made: onnx.ModelProto) -> ort.InferenceSession:
    """One thread, so that timings of two graphs can be compared."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def tables(setting: LongSetting, kv_heads: int, size: int, seed: int = 0, layer: int = 0) -> dict[str, np.ndarray]:
    """The three tables as inputs."""
    return {"fractions": np.array(contract.fractions(seed, layer, kv_heads, setting.samples), np.int64),
            "projections": np.array(contract.projections(seed, layer, size), np.float32),
            "code_order": np.array(contract.code_order(), np.int64)}
