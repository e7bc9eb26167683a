"""A captured fx graph into an onnx_ir Model, with the op library of torch.onnx and nothing else of its exporter."""

from __future__ import annotations

import functools
from typing import Any

import onnx_ir as ir
import torch

from .capture import NotCaptured


@functools.cache
def library(opset: int) -> tuple[Any, dict[Any, Any], tuple[Any, ...]]:
    """(the registry of translations, decompositions for what it lacks, composite ops that it takes whole)."""
    from torch._export.utils import _is_preservable_cia_op
    from torch.onnx._internal.exporter import _decomp, _registration

    from . import functionalize, torchlib

    with torchlib.unparsed():
        registry = _registration.ONNXRegistry.from_torchlib(opset_version=opset)
    for target, function in own_ops().items():
        registry.register_op(target, function, is_complex=False)
    known = set(_decomp.get_onnx_implemented_overloads(registry))
    table = functionalize.plainly(_decomp.create_onnx_friendly_decomposition_table(known))
    kept = tuple(target for target in known if isinstance(target, torch._ops.OpOverload)
                 and _is_preservable_cia_op(target))
    return registry, table, kept


def own_ops() -> dict[Any, Any]:
    """The translations of the torch ops of this package, to give to torch.onnx: attention and the state ops."""
    from ..states import ops as states
    from . import custom_op

    return {**custom_op.translation_table(), **states.translation_table()}


def _sign(graph: torch.fx.GraphModule, registry: Any) -> None:
    """Infer the ONNX signatures of the functions that `graph` will be translated with."""
    for target in {node.target for node in graph.graph.nodes if node.op == "call_function"}:
        for entry in registry.get_decomps(target):
            if entry.signature is None and hasattr(entry, "__post_init__"):
                entry.__post_init__()


PICKS = frozenset({"embedding", "index", "gather", "index_select", "_to_copy", "grouped_query_attention",
                   "linear_attention", "causal_conv"})
"""ops whose tensors have types of their own: nothing is promoted there"""


REDUCES = frozenset({"aten::sum", "aten::mean", "aten::prod"})
"""ops that PyTorch computes in fp32 whatever they are given: written as a Cast on either side"""


def mixes_types(graph: torch.fx.GraphModule) -> bool:
    """Whether an op may promote its inputs: tensors of two types, integers that become or meet floats, sums of halves.

    Some that are named here promote nothing; none that promotes is left out.
    """
    for node in graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target._schema.name.split("::")[1] in PICKS:
            continue
        values = [node.meta.get("val"), *[arg.meta.get("val") if isinstance(arg, torch.fx.Node) else arg
                                          for arg in torch.utils._pytree.arg_tree_leaves(*node.args, **node.kwargs)]]
        types = {value.dtype for value in values[1:] if isinstance(value, torch.Tensor)}
        integral = any(not kind.is_floating_point for kind in types)
        if node.target._schema.name == "aten::where":
            types.discard(torch.bool)
            integral = any(not kind.is_floating_point for kind in types)
        floats = any(isinstance(value, float | torch.SymFloat) for value in values[1:])
        result = isinstance(values[0], torch.Tensor) and values[0].dtype.is_floating_point
        if node.target._schema.name in REDUCES and types & {torch.float16, torch.bfloat16}:
            return True
        if len(types) > 1 or (integral and (floats or result)):
            return True
    return False


def translate(graph: torch.fx.GraphModule, names: dict[str, str], inputs: list[str], outputs: list[str],
              tensors: dict[str, torch.Tensor], opset: int) -> ir.Model:
    """The onnx_ir Model of a captured graph. names: of placeholders; inputs, outputs: in order; tensors: weights and
    buffers by name, which become initializers."""
    from torch.onnx._internal.exporter import _constants, _core, _fx_passes, _ir_passes

    registry, *_ = library(opset)
    if mixes_types(graph):
        _fx_passes.insert_type_promotion_nodes(graph)  # runs every node once more, so only where it may be needed
    graph = _fx_passes.remove_assertion_nodes(graph)
    _sign(graph, registry)
    model = ir.Model(ir.Graph([], [], nodes=[], name="main_graph"), ir_version=_constants.ONNX_IR_VERSION)
    if len(list(graph.named_modules())) > 1:
        raise NotCaptured("the graph has graphs inside it")
    values = _core._translate_fx_graph(graph.graph, model, graph_like=model.graph, owned_graphs={},
                                       lower="at_conversion", registry=registry)
    results = list(model.graph.outputs)
    model.graph.inputs.clear()
    named: dict[str, ir.Value] = {}
    for placeholder, name in names.items():
        value = values[placeholder]
        assert isinstance(value, ir.Value)
        value.name, named[name] = name, value
        if name in tensors:
            value.const_value = _core.TorchTensor(tensors[name], name=name)
            model.graph.initializers[name] = value
    model.graph.inputs.extend(named[name] for name in inputs)
    if len(results) != len(outputs):
        raise NotCaptured(f"{len(results)} outputs, expected {len(outputs)}")
    for value, name in zip(results, outputs):
        value.name = name
    model.opset_imports[""] = opset  # what nodes of torchlib leave undeclared becomes 18 otherwise
    for function in model.functions.values():
        function.opset_imports[""] = opset  # written for 18; none of their ops changed its meaning since
    _ir_passes.add_opset_imports(model)
    return model
