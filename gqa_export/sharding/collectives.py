"""Collectives: how a graph spells them, in which order its ranks meet, and the hash that must be the same on all.

Between sharding and the end of lowering a collective is `gqa::DistCollective` with the attribute
`collective_operation`; then it becomes what TensorRT's ONNX parser reads: `DistCollective` of the standard domain with
`collective_operation`, `reduce_op`, `nb_rank`, `root`, `group_size`, `groups`. Source: Polygraphy 0.53.6
`tools/multi_device`; TensorRT-RTX 1.7 and TensorRT 11 parse it. NCCL gathers along dimension 0.
"""

from __future__ import annotations

import onnx
from onnx import helper

from .. import attention_op
from ..bundle.parallel import DIST_COLLECTIVE

ALL_REDUCE, ALL_GATHER = "all_reduce", "all_gather"


def collective(operation: str, source: str, output: str, name: str) -> onnx.NodeProto:
    """A collective as passes see it."""
    return helper.make_node(DIST_COLLECTIVE, [source], [output], name=name, domain=attention_op.DOMAIN,
                            collective_operation=operation)


def finish_collectives(model: onnx.ModelProto, ranks: int) -> int:
    """Spell the collectives of a lowered rank graph as TensorRT's parser reads them; counts them."""
    count = 0
    for node in model.graph.node:
        if node.op_type != DIST_COLLECTIVE or node.domain != attention_op.DOMAIN:
            continue
        operation = next(helper.get_attribute_value(each) for each in node.attribute
                         if each.name == "collective_operation").decode()
        del node.attribute[:]
        node.domain = ""
        node.attribute.extend([
            helper.make_attribute("collective_operation", operation),
            helper.make_attribute("reduce_op", "sum" if operation == ALL_REDUCE else "none"),
            helper.make_attribute("nb_rank", ranks), helper.make_attribute("root", -1),
            helper.make_attribute("group_size", 0),
            helper.make_attribute("groups", [], attr_type=onnx.AttributeProto.INTS)])
        count += 1
    used = {node.domain for node in model.graph.node}
    for place in reversed(range(len(model.opset_import))):
        if model.opset_import[place].domain == attention_op.DOMAIN and attention_op.DOMAIN not in used:
            del model.opset_import[place]
    return count
