"""Numbers that a low format rounds: does the graph multiply by what PyTorch multiplies by?"""

from __future__ import annotations

import gqa_models
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoConfig

from gqa_export.trace.capture.scalars import keep_exact
from gqa_export.trace.tracing import trace

OPS = {"times": lambda x: x * 0.22, "number first": lambda x: 1.702 * x, "over": lambda x: x / 0.3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_the_widened_op_is_pytorchs_own_to_the_last_bit(op, dtype) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    graph = make_fx(op)(x)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = x
    assert keep_exact(graph.graph) == 1
    graph.recompile()
    assert sum(node.target is torch.ops.aten._to_copy.default for node in graph.graph.nodes) == 2
    assert torch.equal(graph(x), op(x))


@pytest.mark.parametrize(("op", "dtype"), [(lambda x: x * 0.25, torch.bfloat16), (lambda x: x * 0.22, torch.float32),
                                           (lambda x: x * 2, torch.float16)])
def test_numbers_that_are_not_rounded_are_left_alone(op, dtype) -> None:
    assert keep_exact(make_fx(op)(torch.ones(3, dtype=dtype)).graph) == 0


def test_no_constant_of_a_bf16_trace_is_a_rounded_multiplier(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GQA_EXPORT_TRACE_CACHE", "off")
    config = AutoConfig.from_pretrained(gqa_models.write_tiny("granite", tmp_path / "granite"))
    model = trace(config, dtype="bfloat16", cache="growing", capacity=64).model
    assert config.residual_multiplier == 0.6  # 0.6015625 in bf16
    small = [numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer
             if t.data_location != onnx.TensorProto.EXTERNAL and not t.dims]
    small += [numpy_helper.to_array(a.t).astype(np.float64) for n in model.graph.node if n.op_type == "Constant"
              for a in n.attribute if a.name == "value" and not a.t.dims]
    near = [float(value) for value in small if abs(value - config.residual_multiplier) < 1e-2]
    assert near
    assert near == pytest.approx([config.residual_multiplier] * len(near), rel=1e-7)


def test_parameters_that_transformers_keeps_in_fp32_stay_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GQA_EXPORT_TRACE_CACHE", "off")
    config = AutoConfig.from_pretrained(gqa_models.write_tiny("gpt_oss", tmp_path / "gpt_oss", num_hidden_layers=2))
    for dtype, kept in (("float16", onnx.TensorProto.FLOAT), ("bfloat16", onnx.TensorProto.BFLOAT16)):
        model = trace(config, dtype=dtype, cache="growing", capacity=64).model
        norms = {t.data_type for t in model.graph.initializer if t.name.endswith("norm.weight")}
        assert norms == {kept}
