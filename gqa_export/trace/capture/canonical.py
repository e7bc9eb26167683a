"""From a traced, simplified module to the canonical ONNX model: weights by recipe, names with places, plain shapes.

Every weight is an initializer without bytes: its external location is the recipe `weights:NAME` (see
`gqa_export.weights.sources`). Every node's name starts with the module it came from, because graphsurgeon keeps names
but not metadata. """

from __future__ import annotations

import onnx
import onnx_ir as ir

from ... import attention_op, graph_io
from ...spec import ModelSpec

IR_VERSION = 10
SCOPES = "pkg.torch.onnx.name_scopes"


def plain_reshapes(model: ir.Model) -> int:
    """Give every Reshape a constant shape where the traced shapes allow it ([0, 0, -1] style); returns how many.

    0 copies the input's dimension at the same place, so a symbolic dimension that is equal there needs no Shape.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.domain or node.inputs[1].producer() is None:  # type: ignore[union-attr]
            continue
        before, after = node.inputs[0].shape, node.outputs[0].shape  # type: ignore[union-attr]
        if before is None or after is None:
            continue
        target: list[int] = []
        for place, dim in enumerate(after):
            if isinstance(dim, int):
                target.append(dim)
            elif place < len(before) and str(before[place]) == str(dim):
                target.append(0)
            else:
                target.append(-1)
        if target.count(-1) > 1:
            continue
        name = "shape/" + "_".join(str(size) for size in target)
        if name not in model.graph.initializers:
            value = ir.Value(name=name, const_value=ir.tensor(target, dtype=ir.DataType.INT64, name=name),
                             type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(target)]))
            model.graph.initializers.add(value)
        node.replace_input_with(1, model.graph.initializers[name])
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        count += 1
    return count


def read_sizes_from_the_first(model: ir.Model) -> None:
    """Read sizes from the first input that has that shape: every layer's cache has the same one, and which of them a
    trace recorded is chance."""
    first: dict[tuple[str, ...], ir.Value] = {}
    for value in model.graph.inputs:
        if value.shape is not None:
            first.setdefault(tuple(str(size) for size in value.shape), value)
    inputs = {id(value) for value in model.graph.inputs}
    for node in model.graph:
        if node.op_type == "Shape" and not node.domain and id(node.inputs[0]) in inputs:
            shape = node.inputs[0].shape  # type: ignore[union-attr]
            if shape is not None:
                node.replace_input_with(0, first[tuple(str(size) for size in shape)])


def scope_of(node: ir.Node) -> str:
    """The dotted name of the module a node came from, without the wrapper's own; "" at the top."""
    scopes = node.metadata_props.get(SCOPES, "")
    names = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    modules = [name for name in names[:-1] if name]
    return modules[-1].removeprefix("model").removeprefix(".") if modules else ""


def name_nodes(model: ir.Model) -> None:
    """Name every node `module/OpType_k`, values by their node; graph inputs and outputs keep their names."""
    seen: dict[str, int] = {}
    outputs = {id(value) for value in model.graph.outputs}
    for node in model.graph:
        stem = f"{scope_of(node) or 'graph'}/{node.op_type}"
        seen[stem] = seen.get(stem, -1) + 1
        node.name = f"{stem}_{seen[stem]}"
        for place, value in enumerate(node.outputs):
            if id(value) not in outputs:
                value.name = f"{node.name}.{place}"
        node.metadata_props.clear()


def to_proto(model: ir.Model, weights: list[ir.Value], spec: ModelSpec, *, cache: str, logits: str, interface: str,
             prefix: str, hidden: bool = False) -> onnx.ModelProto:
    """Serialise: weights become initializers with a recipe instead of bytes; inputs and outputs get their facts."""
    from onnx_ir import serde

    names = {id(value): (value.name or "").removeprefix(prefix) for value in weights}
    for value in weights:
        value.name = names[id(value)]
        model.graph.inputs.remove(value)
    used = [value for value in weights if value.uses()]
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "gqa-export", ""
    model.metadata_props.clear()
    proto = serde.serialize_model(model)
    for value in used:
        tensor = proto.graph.initializer.add()
        tensor.name = value.name or ""
        tensor.data_type = int(value.dtype)  # type: ignore[arg-type]
        tensor.dims.extend(int(size) for size in value.shape)  # type: ignore[union-attr, arg-type]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", graph_io.RECIPE + tensor.name
    _set_interface(proto, spec, cache, logits, interface, hidden)
    proto.graph.name = spec.model_type
    del proto.graph.value_info[:]
    if not any(opset.domain == attention_op.DOMAIN for opset in proto.opset_import):
        proto.opset_import.add(domain=attention_op.DOMAIN, version=attention_op.VERSION)
    return proto


def _set_interface(proto: onnx.ModelProto, spec: ModelSpec, cache: str, logits: str, interface: str,
                   hidden: bool) -> None:
    dtype_of = {value.name: value.type.tensor_type.elem_type for value in [*proto.graph.input, *proto.graph.output]}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(dtype_of[graph_io.LOGITS]).name
    facts = [*graph_io.graph_inputs(spec, dtype, cache, interface),
             *graph_io.graph_outputs(spec, dtype, cache, logits, hidden=hidden)]
    shapes = {fact.name: fact.shape for fact in facts}
    for values in (proto.graph.input, proto.graph.output):
        for value in values:
            if value.name in shapes:
                value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, dtype_of[value.name],
                                                                  list(shapes[value.name])))
