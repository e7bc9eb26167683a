"""Builds an engine of two attention layers with the C++ plugin: a process of its own, started with the library's folder
on the search path (see `gqa_export.environment.tensorrt_libraries`). Arguments: module, plugin
library, where the engine goes."""

from __future__ import annotations

import importlib
import sys

HEADS, KV_HEADS, HEAD, CAPACITY = 4, 2, 32, 64
BATCH, PROMPT = 2, 16


def graph() -> bytes:
    """Two attention nodes, one after the other, over caches of their own; the second has a window."""
    from onnx import TensorProto, helper

    def value(name: str, shape: list, kind: int = TensorProto.FLOAT16):
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [value("query", ["b", "s", HEADS * HEAD]), value("key", ["b", "s", KV_HEADS * HEAD]),
              value("value", ["b", "s", KV_HEADS * HEAD]), value("past_lengths", ["b"], TensorProto.INT32),
              value("new_lengths", ["b"], TensorProto.INT32)]
    nodes, outputs, query = [], [], "query"
    for layer, window in enumerate((0, 8)):
        pasts, presents = ([f"{word}_{part}{layer}" for part in ("key", "value")] for word in ("past", "present"))
        nodes.append(helper.make_node(
            "GroupedQueryAttention", [query, "key", "value", *pasts, "past_lengths", "new_lengths"],
            [f"output{layer}", *presents], name=f"layer{layer}", domain="gqa", plugin_version="1",
            plugin_namespace="gqa", num_heads=HEADS, kv_num_heads=KV_HEADS, scale=HEAD ** -0.5, softcap=0.0,
            window=window, rotary_interleaved=0, growing=0, has_rotary=0, has_sinks=0, has_new=1))
        cache = ["b", KV_HEADS, CAPACITY, HEAD]
        inputs += [value(name, cache) for name in pasts]
        outputs += [value(name, cache) for name in presents]
        query = f"output{layer}"
    outputs.append(value(query, ["b", "s", HEADS * HEAD]))
    model = helper.make_model(helper.make_graph(nodes, "attention", inputs, outputs), ir_version=10,
                              opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("gqa", 1)])
    return model.SerializeToString()


def main() -> None:
    """Build for 8.9, with a decode and a prefill profile."""
    module, library, path = sys.argv[1:]
    trt = importlib.import_module(module)
    log = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(log)
    if trt.get_plugin_registry().load_library(library) is None:
        sys.exit("the registry did not load the library")
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph()):
        sys.exit("\n".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for steps in (1, PROMPT):
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            axes = list(tensor.shape)
            least, most = [1 if axis == -1 else axis for axis in axes], [BATCH, *axes[1:]]
            if len(axes) == 3:
                least[1], most[1] = 1, steps
            profile.set_shape(tensor.name, least, most, most)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        sys.exit("no engine")
    with open(path, "wb") as file:
        file.write(memoryview(engine))
    print("layers", sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers)))


if __name__ == "__main__":
    main()
