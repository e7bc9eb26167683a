"""The build log, read: layers per profile, inputs and outputs, copies of the cache, why a build failed."""

from __future__ import annotations

from gqa_export.engine.build_log import lacks_kernel, last_lines, read_log

CACHE = {"past_key_values.0.key", "present.0.key"}
TENSOR = "{{ Name: {}, Location: Device, Dimensions: [-1,2,64,32], Datatype: Half, Format: Format not available }}"


def layer(name: str, kind: str, reads: tuple[str, ...] = (), writes: tuple[str, ...] = ()) -> str:
    """A line as TensorRT for RTX 1.7 writes it."""
    inputs, outputs = (", ".join(TENSOR.format(one) for one in names) for names in (reads, writes))
    return (f"    Name: {name}, LayerType: {kind}, Inputs: [{inputs}], Outputs: [{outputs}], TacticValue: 0x0, "
            "StreamId: 0, Metadata: ")


def log(*lines: str) -> str:
    return "\n".join(["[V] Engine generation completed in 2.7 seconds.", "[X] Layers:", *lines, "    ",
                      "    I/O Tensors:",
                      "     Name: input_ids, IOMode: Input, DataType: Int32, Dimensions: [-1,-1], Location: Device",
                      "     Name: logits, IOMode: Output, DataType: Half, Dimensions: [-1,1,100], Location: Device",
                      "    Engine Metadata:", "     Multi-Device: Disabled",
                      "    Name: later, LayerType: PluginV3, Inputs: [], Outputs: []"])


def attention(profile: str = "") -> str:
    return layer(f"layer0.attention{profile}", "PluginV3", (f"q0{profile}", f"past_key_values.0.key{profile}"),
                 (f"o0{profile}", f"present.0.key{profile}"))


def test_layers_belong_to_the_profile_that_their_names_or_tensors_carry() -> None:
    found = read_log(log(attention(), layer("__myl_Cast", "kgen", ("input_ids",), ("x0",)), attention(" [profile 1]"),
                         layer("__myl_Resh_11", "kgen", ("a [profile 1]",), ("b [profile 1]",))))
    assert [(one.name, one.kind, one.profile) for one in found.layers] == [
        ("layer0.attention", "PluginV3", 0), ("__myl_Cast", "kgen", 0), ("layer0.attention", "PluginV3", 1),
        ("__myl_Resh_11", "kgen", 1)]
    assert [found.plugins(number) for number in (0, 1, 2)] == [1, 1, 0]
    assert found.kinds(1) == {"PluginV3": 1, "kgen": 1}
    assert found.layers[2].reads == ("q0", "past_key_values.0.key")
    assert found.layers[2].writes == ("o0", "present.0.key")


def test_inputs_and_outputs_are_read_with_type_and_shape() -> None:
    assert read_log(log()).tensors == {"input_ids": ("Input", "Int32", (-1, -1)),
                                       "logits": ("Output", "Half", (-1, 1, 100))}


def test_a_copy_of_the_cache_is_found_and_one_in_name_only_is_not() -> None:
    copy = layer("Reformatting CopyNode for Network Input past_key_values.0.key [profile 1]", "Reformat",
                 ("past_key_values.0.key [profile 1]",), ("Reformatted past_key_values.0.key [profile 1]",))
    other = layer("Reformatting CopyNode for Network Input past_lengths", "Reformat", ("past_lengths",), ("x",))
    assert read_log(log(attention(), copy.replace("Reformat,", "NoOp,"), other)).copies(CACHE) == []
    assert read_log(log(attention(), copy)).copies(CACHE) == [
        "Reformatting CopyNode for Network Input past_key_values.0.key (Reformat, profile 1)"]


def test_a_second_list_replaces_the_first() -> None:
    assert read_log(log(attention()) + "\n" + log()).layers == ()


def test_a_log_without_lists_gives_none() -> None:
    found = read_log("[V] nothing to see\n")
    assert found.layers == ()
    assert found.tensors == {}


def test_the_lack_of_an_attention_kernel_is_recognized() -> None:
    assert lacks_kernel("[E] Error Code 2: Attention is not supported by a dedicated kernel; see is_decomposable()")
    assert not lacks_kernel("[E] Error Code 4: could not find any implementation for node")


def test_the_last_lines_are_the_errors_where_there_are_any() -> None:
    text = "\n".join(["[V] a", "[E] first", "[V] b", "terminate called without an active exception", "[V] c"])
    assert last_lines(text).splitlines() == ["[E] first", "terminate called without an active exception"]
    assert last_lines("one\ntwo\n\nthree\n", 2).splitlines() == ["two", "three"]
    assert len(last_lines("x" * 9999)) == 400


def product(kind: str, types: tuple[str, ...], constants: tuple[str, ...], nodes: tuple[str, ...],
            profile: str = "") -> str:
    """A line of a product, with constants and the nodes that it is made of, as TensorRT for RTX 1.7 writes it."""
    def tensors(label: str, found: tuple[str, ...]) -> str:
        return ", ".join(f"{{ Name: {label}{place}{profile}, Dimensions: [64], Datatype: {name}, Format: (Linear) }}"
                         for place, name in enumerate(found))

    return (f"    Name: {nodes[0]}{profile}_myl0_1, LayerType: {kind}, Inputs: [ {tensors('x', types)}], Constants: [ "
            f"{tensors('w', constants)}], Outputs: [ {tensors('y', ('Half',))}], TacticName: , StreamId: 0, Metadata: "
            + "".join(f"[ONNX Layer: {name}]" for name in nodes))


def test_products_of_codes_have_codes_on_both_sides() -> None:
    """A kernel of another kind is none, nor is a product whose weight alone is codes; layers may hold several nodes."""
    found = read_log(log(
        product("gemm", ("FP8",), ("FP8", "Float"), ("q/MatMul", "k/MatMul")),
        product("gemm", ("FP4E2M1", "FP8"), ("FP4E2M1", "Float", "FP8"), ("o/MatMul",)),
        product("gemm", ("Half",), ("FP8",), ("up/MatMul",)), product("kgen", ("FP8",), ("FP8",), ("down/MatMul",)),
        product("gemm", ("FP8",), ("FP8",), ("head/MatMul",), " [profile 1]")))
    assert found.products_of_codes(0) == {"q/MatMul", "k/MatMul", "o/MatMul"}
    assert found.products_of_codes(1) == {"head/MatMul"}
