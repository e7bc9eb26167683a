"""One rank's canonical graph: the plan carried out. Only the first axis of weights and the numbers of shapes change,
and collectives, masks and local indices of experts come in; every rank's graph has the same nodes in the same order."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .. import attention_op, graph_io
from ..errors import UnsupportedModel
from .collectives import ALL_GATHER, ALL_REDUCE, collective
from .experts import MASKED, local_index, own_share
from .facts import Cut
from .flow import SUMMED, Flow
from .plan import FIX, Plan
from .taken import pieces
from .view import attribute, is_attention, label


def cut_name(name: str, cut: Cut, rank: int) -> str:
    """The recipe of the part of a weight that a rank holds: `A[0:8]`, `A[:,0:8]`; several ranges of rows are several
    weights, joined along the first axis."""
    lead = ":," * cut.axis
    ranges = [f"{start}:{stop}" for start, stop in cut.parts[rank]]
    return "+".join(f"{name}[{each}]" for each in ranges) if not cut.axis else f"{name}[{lead}{';'.join(ranges)}]"


class RankGraph:
    """Writes the graph of one rank."""

    def __init__(self, plan: Plan, flow: Flow, rank: int) -> None:
        self.plan, self.flow, self.rank, self.view = plan, flow, rank, plan.view
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, onnx.TensorProto] = {}
        self.values: list[onnx.ValueInfoProto] = []

    def model(self, traced: onnx.ModelProto) -> onnx.ModelProto:
        """The canonical model of the rank, weights as recipes."""
        for position, node in enumerate(self.view.nodes):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            self._inputs(copy, position)
            self._node(node, copy, position)
            for name in node.output:
                self._after(node, name)
        model = onnx.ModelProto()
        model.ir_version, model.producer_name = traced.ir_version, traced.producer_name
        model.opset_import.extend(traced.opset_import)
        graph = model.graph
        graph.name = traced.graph.name
        graph.input.extend(traced.graph.input)
        graph.output.extend(traced.graph.output)
        self._interface(graph)
        graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input}
        for tensor in traced.graph.initializer:
            if tensor.name in read:
                graph.initializer.append(self._part(tensor))
        graph.initializer.extend(tensor for name, tensor in self.tensors.items() if name in read)
        graph.value_info.extend(self.values)
        return model

    def _interface(self, graph: onnx.GraphProto) -> None:
        heads = {layer.layer: layer.kv_num_heads for layer in self.plan.rank_spec(self.rank).layers}
        for value in (*graph.input, *graph.output):
            number = graph_io.layer_of_cache(value.name)
            if number is not None:
                value.type.tensor_type.shape.dim[1].dim_value = heads[number]

    def _part(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """An initializer as the rank holds it."""
        cut = self.plan.cuts.get(tensor.name)
        return tensor if cut is None else self._cut_tensor(tensor, cut, tensor.name)

    def _cut_tensor(self, tensor: onnx.TensorProto, cut: Cut, name: str) -> onnx.TensorProto:
        if tensor.data_location != TensorProto.EXTERNAL:
            value = numpy_helper.to_array(tensor)
            return numpy_helper.from_array(np.ascontiguousarray(self._cut_array(value, cut)), name)
        dims = list(tensor.dims)
        dims[cut.axis] = cut.size(self.rank)
        part = TensorProto(name=name, dims=dims, data_type=tensor.data_type, data_location=TensorProto.EXTERNAL)
        location = next(entry.value for entry in tensor.external_data if entry.key == "location")
        recipe = cut_name(location.removeprefix(graph_io.RECIPE), cut, self.rank)
        part.external_data.add(key="location", value=graph_io.RECIPE + recipe)
        return part

    def _cut_array(self, value: np.ndarray, cut: Cut) -> np.ndarray:
        lead = (slice(None),) * cut.axis
        return np.concatenate([value[(*lead, slice(start, stop))] for start, stop in cut.parts[self.rank]], cut.axis)

    def _inputs(self, copy: onnx.NodeProto, position: int) -> None:
        """Let a node read the sum over the ranks, or its share with zeros elsewhere, where the flow says so."""
        settled = self.flow.inputs.get(position, set())
        for place, name in enumerate(copy.input):
            if name in self.flow.summed and name in settled:
                copy.input[place] = name + SUMMED
            elif name in self.flow.masked:
                copy.input[place] = name + MASKED

    def _node(self, node: onnx.NodeProto, copy: onnx.NodeProto, position: int) -> None:
        cuts = self.plan.cuts
        if node is self.plan.head:
            self._head(copy)
            return
        if is_attention(node):
            self._heads(node, copy)
        elif node.op_type in ("Reshape", "Expand") and node.output[0] in cuts:
            copy.input[1] = self._shape(node, cuts[node.output[0]], node.input[1])
        elif node.op_type == "ConstantOfShape" and node.output[0] in cuts:
            copy.input[0] = self._shape(node, cuts[node.output[0]], node.input[0])
        elif node.op_type == "Split" and node.input[0] in cuts and any(
                axis == cuts[node.input[0]].axis for _, axis, _, _ in pieces(self.view, node)):
            self._split(node, copy, cuts[node.input[0]])
        elif node.op_type == "Slice" and node.input[0] in cuts:
            self._slice(node, copy, cuts[node.input[0]])
        elif node.op_type in ("Gather", "GatherND") and node.output[0] in self.flow.choices \
                and node.input[0] in self.view.initializers:
            copy.input[1] = local_index(self, self.flow.choices[node.output[0]], copy.input[1])
        elif position in self.flow.means:
            self._mean(node, copy, self.flow.means[position])
            return
        elif node.op_type == "Constant" and node.output[0] in cuts:
            for each in copy.attribute:
                if each.name == "value":
                    each.t.CopyFrom(self._cut_tensor(each.t, cuts[node.output[0]], each.t.name))
        self.nodes.append(copy)

    def _after(self, node: onnx.NodeProto, name: str) -> None:
        """Behind the node that computes a tensor: zeros for other ranks' experts, the sum over the ranks."""
        source = name
        if name in self.flow.masked:
            source = own_share(self, name, self.flow.masked[name])
        if name in self.flow.summed:
            self.nodes.append(collective(ALL_REDUCE, source, name + SUMMED, name.rpartition(".")[0] + "/all_reduce"
                                         if len(node.output) == 1 else name + "/all_reduce"))
            self._typed(name + SUMMED, name)

    def _typed(self, name: str, like: str) -> None:
        if like in self.view.types:
            shape: list[Any] = list(self.view.shape(like))
            self.values.append(helper.make_tensor_value_info(name, self.view.types[like], shape))

    def constant(self, name: str, value: np.ndarray) -> str:
        """A constant of the graph; equal names mean equal values."""
        self.tensors.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def numbers(self, numbers: list[int]) -> str:
        """Whole numbers as a constant of the graph."""
        return self.constant("local/" + "_".join(map(str, numbers)), np.array(numbers, np.int64))

    def _heads(self, node: onnx.NodeProto, copy: onnx.NodeProto) -> None:
        held = self.plan.heads[self._layer(node)][self.rank]
        sizes = {"num_heads": attribute(node, "num_heads", 0) // self.plan.ranks, "kv_num_heads": len(held)}
        for each in copy.attribute:
            each.i = sizes.get(each.name, each.i)

    def _layer(self, node: onnx.NodeProto) -> int:
        number = graph_io.layer_of_cache(node.input[attention_op.input_index("past_key")])
        assert number is not None
        return number

    def _shape(self, node: onnx.NodeProto, cut: Cut, given: str) -> str:
        """The shape that a Reshape or Expand gives, with the rank's number on the cut axis."""
        numbers, size = self.view.numbers(given), cut.size(self.rank)
        place = cut.axis - (len(self.view.shape(node.output[0])) - len(numbers) if numbers is not None else 0)
        if numbers is not None:
            if place < 0 or numbers[place] in (0, -1, 1):
                return given
            return self.numbers([*numbers[:place], size, *numbers[place + 1:]])
        maker = self.view.made_by.get(given)
        if maker is None or maker.op_type != "Concat":
            raise UnsupportedModel(f"the shape of {label(node)} is computed, and an axis of it is cut", label(node),
                                   FIX, code="E-MODEL-SHARD-RULE")
        position, inputs = 0, []
        for name in maker.input:
            entries = self.view.numbers(name)
            count = len(entries) if entries is not None else 1
            inside = position <= cut.axis < position + count
            if inside and entries is not None and entries[cut.axis - position] not in (-1, 0, 1):
                entries = [size if position + i == cut.axis else entry for i, entry in enumerate(entries)]
                name = self.numbers(entries)
            inputs.append(name)
            position += count
        made = helper.make_node("Concat", inputs, [f"{node.name}/local_shape.0"], name=f"{node.name}/local_shape",
                                axis=0)
        self.nodes.append(made)
        return made.output[0]

    def _local(self, cut: Cut, bound: int) -> int:
        """Entries that the rank holds of those before `bound`."""
        if list(cut.parts[self.rank]) != sorted(cut.parts[self.rank]):
            raise UnsupportedModel("a part is taken of an axis whose entries are cut out of order", "", FIX,
                                   code="E-MODEL-SHARD-RULE")
        return sum(max(0, min(stop, bound) - start) for start, stop in cut.parts[self.rank])

    def _split(self, node: onnx.NodeProto, copy: onnx.NodeProto, cut: Cut) -> None:
        sizes = [self._local(cut, stop) - self._local(cut, start) for _, _, start, stop in pieces(self.view, node)]
        kept = [each for each in node.attribute if each.name != "num_outputs"]
        del copy.attribute[:]
        copy.attribute.extend(kept)
        source = copy.input[0]
        del copy.input[:]
        copy.input.extend([source, self.numbers(sizes)])

    def _slice(self, node: onnx.NodeProto, copy: onnx.NodeProto, cut: Cut) -> None:
        found = list(pieces(self.view, node))
        if all(axis != cut.axis for _, axis, _, _ in found):
            return
        starts, stops = [list(self.view.numbers(node.input[place]) or ()) for place in (1, 2)]
        for place, (_, axis, start, stop) in enumerate(found):
            if axis == cut.axis:
                starts[place], stops[place] = self._local(cut, start), self._local(cut, stop)
        copy.input[1], copy.input[2] = self.numbers(starts), self.numbers(stops)

    def _mean(self, node: onnx.NodeProto, copy: onnx.NodeProto, divisor: int) -> None:
        """A rank's summand of a sum or mean over a cut axis."""
        name, out = node.name, node.output[0]
        copy.op_type = "ReduceSum"
        copy.name, copy.output[0] = f"{name}/own", f"{name}/own.0"
        element = self.view.types.get(out, TensorProto.FLOAT)
        dtype = helper.tensor_dtype_to_np_dtype(element)
        factor = self.constant(f"one_of/{divisor}", np.array(1.0 / divisor, dtype))
        self.nodes += [copy, helper.make_node("Mul", [f"{name}/own.0", factor], [out], name=name)]

    def _head(self, copy: onnx.NodeProto) -> None:
        """The rank's rows of the vocabulary, then all of them: the vocabulary first, gathered, last again."""
        view, plan, out = self.view, self.plan, copy.output[0]
        maker = view.made_by[copy.input[1]]
        weight = self._cut_tensor(view.initializers[maker.input[0]], Cut(0, plan.vocabulary), "head/rows")
        self.tensors["head/rows"] = weight
        size, rows = int(str(view.shape(out)[2])), weight.dims[0]
        turned = helper.make_node("Transpose", ["head/rows"], ["head/turned"], name="head/turned", perm=[1, 0])
        product = helper.make_node("MatMul", [copy.input[0], "head/turned"], ["head/own"], name=copy.name)
        first = helper.make_node("Transpose", ["head/own"], ["head/first"], name="head/first", perm=[2, 0, 1])
        gathered = collective(ALL_GATHER, "head/first", "head/all", f"{copy.name}/all_gather")
        self.nodes += [turned, product, first, gathered]
        batch, step = view.shape(out)[:2]
        self.values.append(helper.make_tensor_value_info("head/all", view.types[out], [rows * plan.ranks, batch, step]))
        together, whole = "head/all", rows * plan.ranks
        if whole > size:  # the last rank's rows begin earlier: those that others gave are dropped
            others = (plan.ranks - 1) * rows
            for label_, start, stop in (("others", 0, others), ("last", whole - (size - others), whole)):
                self.nodes.append(helper.make_node(
                    "Slice", ["head/all", self.numbers([start]), self.numbers([stop]), self.numbers([0])],
                    [f"head/{label_}"], name=f"head/{label_}"))
            together = "head/once"
            self.nodes.append(helper.make_node("Concat", ["head/others", "head/last"], [together], name=together,
                                               axis=0))
        self.nodes.append(helper.make_node("Transpose", [together], [out], name="head/logits", perm=[1, 2, 0]))
