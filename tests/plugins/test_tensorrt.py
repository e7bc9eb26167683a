"""The plugin class and its creator: fields, shapes, formats, aliases, launches; held in a stand-in for TensorRT, and,
where TensorRT for RTX is installed, in the real module as well."""

from __future__ import annotations

import dataclasses
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_tensorrt as fake
import numpy as np
import pytest
from gqa_plugins.grouped_attention import driver, driver_ctypes, fields, launch, limits, plugin_layer
from gqa_plugins.grouped_attention import tensorrt as plugin
from gqa_plugins.grouped_attention.fields import Key
from gqa_plugins.grouped_attention.launch import Layer, Sizes
from gqa_plugins.grouped_attention.plugin_layer import Kernels, State
from refusal import refused
from test_tensorrt_launch import LLAMA, cubins

from gqa_export import attention_op
from gqa_export.environment import tensorrt_libraries

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = Sizes(2, 1, 1024, 64, 64, "fp16", 32, 1024)
TYPES = {"fp16": "HALF", "bf16": "BF16", "fp32": "FLOAT"}


def real_module() -> ModuleType:
    """TensorRT for RTX in this process: its libraries are loaded first, so that no search path is needed."""
    if not tensorrt_libraries.is_there("rtx"):
        pytest.skip("TensorRT for RTX is not installed: pip install 'gqa-export[rtx]'")
    library = tensorrt_libraries.find("rtx")
    tensorrt_libraries.preload(library)
    return __import__(library.module)


@pytest.fixture(params=["stand-in", "rtx"])
def trt(request) -> ModuleType:
    return fake.module() if request.param == "stand-in" else real_module()


@pytest.fixture
def kernels() -> Kernels:
    """Files that only say how they are launched, for 8.0 and 8.9."""
    keys: dict[str, dict[int, str]] = {}
    files = []
    for capability in (80, 89):
        for name, cubin in cubins(LLAMA, SIZES, capability).items():
            data = dataclasses.replace(cubin, code=f"{name}-{capability}".encode(), shared_bytes=60000).to_bytes()
            files.append(data)
            variant = launch.variants(LLAMA, SIZES)[name].name
            keys.setdefault(variant, {})[capability] = __import__("hashlib").sha256(data).hexdigest()
    return Kernels(keys, fields.pack(files))


@pytest.fixture(autouse=True)
def _clean(monkeypatch) -> None:
    monkeypatch.setattr(plugin, "failures", [])
    monkeypatch.setattr(driver, "_LOADED", {})


def collection(trt: ModuleType, values: dict[str, Any]) -> Any:
    """Creation fields as the ONNX parser hands them over."""
    kinds = dict(fields.CREATION)
    numbers = {"int32": (np.int32, trt.PluginFieldType.INT32), "float32": (np.float32, trt.PluginFieldType.FLOAT32)}
    made = []
    for name, value in values.items():
        if name in kinds:
            made.append(trt.PluginField(name, np.array([value], numbers[kinds[name]][0]), numbers[kinds[name]][1]))
        else:
            made.append(trt.PluginField(name, np.frombuffer(value, np.int8), trt.PluginFieldType.CHAR))
    kept.append(made)
    return trt.PluginFieldCollection(made)


kept: list[Any] = []  # TensorRT's fields do not hold their memory


def built(trt: ModuleType, layer: Layer = LLAMA, **extra: Any) -> Any:
    """A plugin as the ONNX parser makes one."""
    creator = plugin._creator(trt)
    values = {**dataclasses.asdict(layer), "plugin_version": b"1", "plugin_namespace": b"gqa", **extra}
    return creator.create_plugin("layer0", collection(trt, values), trt.TensorRTPhase.BUILD)


def tensors(trt: ModuleType, state: State, sizes: Sizes) -> tuple[list[Any], list[Any]]:
    """Descriptions of a call's inputs and outputs."""
    B, S, C, layer = sizes.batch, sizes.steps, sizes.capacity, state.layer
    shapes = {"query": (B, S, layer.num_heads * sizes.head), "key": (B, S, layer.kv_num_heads * sizes.head),
              "value": (B, S, layer.kv_num_heads * sizes.value_head),
              "past_key": (B, layer.kv_num_heads, C, sizes.head), "past_value":
              (B, layer.kv_num_heads, C, sizes.value_head), "past_lengths": (B,), "new_lengths": (B,),
              "cos": (sizes.max_position, sizes.rotary_half), "sin": (sizes.max_position, sizes.rotary_half),
              "sinks": (layer.num_heads,), "output": (B, S, layer.num_heads * sizes.value_head)}
    shapes |= {"present_key": shapes["past_key"], "present_value": shapes["past_value"]}
    T = getattr(trt.DataType, TYPES[sizes.dtype])

    def one(name: str) -> Any:
        return fake.tensor(shapes[name], trt.DataType.INT32 if name in plugin.LENGTHS else T, trt.TensorFormat.LINEAR)

    return [one(name) for name in state.inputs], [one(name) for name in state.outputs]


def serialized(one: Any) -> dict[str, Any]:
    return {field.name: field for field in one.get_fields_to_serialize()}


def test_it_is_found_by_the_name_version_and_namespace_of_the_node(trt) -> None:
    creator = plugin.register(trt)
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == (attention_op.OP, "1", "gqa")
    assert [field.name for field in creator.field_names] == [name for name, _ in fields.CREATION]
    assert plugin.register(trt) is creator, "a process registers it once"


def test_present_is_the_memory_of_past_and_nothing_else_is(trt) -> None:
    one = built(trt)
    inputs = one.state.inputs
    assert [one.get_aliased_input(index) for index in range(one.num_outputs)] == [
        -1, inputs.index("past_key"), inputs.index("past_value")]
    reader = built(trt, dataclasses.replace(LLAMA, has_new=0))
    assert reader.num_outputs == 1
    assert reader.get_aliased_input(0) == -1


def test_formats_are_linear_one_float_type_and_int32_lengths() -> None:
    trt = fake.module()
    one = built(trt)
    inputs, outputs = tensors(trt, one.state, SIZES)
    every = [*inputs, *outputs]
    assert all(one.supports_format_combination(place, every, len(inputs)) for place in range(len(every)))
    for dtype in ("bf16", "fp32"):
        ins, outs = tensors(trt, one.state, dataclasses.replace(SIZES, dtype=dtype))
        assert all(one.supports_format_combination(place, [*ins, *outs], len(ins)) for place in range(len(every)))
    wrong = {0: fake.tensor((1,), trt.DataType.INT8), 1: fake.tensor((1,), trt.DataType.FLOAT),
             5: fake.tensor((1,), trt.DataType.HALF),
             9: fake.tensor((1,), trt.DataType.HALF, trt.TensorFormat.CHW4)}
    for place, tensor in wrong.items():
        assert not one.supports_format_combination(place, [*every[:place], tensor], len(inputs)), place


def test_output_shapes_follow_the_inputs() -> None:
    trt = fake.module()
    one = built(trt)
    sizes = dataclasses.replace(SIZES, value_head=48)
    inputs, outputs = tensors(trt, one.state, sizes)
    shapes = one.get_output_shapes([tensor.dims for tensor in inputs], [], fake.Expressions())
    assert [tuple(shape) for shape in shapes] == [tensor.dims for tensor in outputs]
    assert one.get_output_data_types([trt.DataType.HALF] * len(inputs)) == [trt.DataType.HALF] * 3


def test_serialized_fields_have_the_names_types_and_order_that_fields_says(trt, kernels) -> None:
    plugin.register(trt, kernels)
    one = built(trt).clone()
    one.configure_plugin(*tensors(trt, one.state, SIZES))
    found = list(one.get_fields_to_serialize())
    assert [field.name for field in found] == [name for name, _ in fields.SERIALIZED]
    kinds = {"int32": trt.PluginFieldType.INT32, "float32": trt.PluginFieldType.FLOAT32,
             "char": trt.PluginFieldType.CHAR}
    assert [field.type for field in found] == [kinds[kind] for _, kind in fields.SERIALIZED]
    values = {field.name: field.data for field in found}
    assert values["scale"].item() == pytest.approx(LLAMA.scale)
    assert values["contract_version"].item() == attention_op.VERSION
    assert values["cubins"].tobytes() == kernels.container
    expected = {Key(name, capability, kernels.keys[variant.name][capability]) for capability in (80, 89)
                for name, variant in launch.variants(LLAMA, SIZES).items()}
    assert set(fields.parse_keys(values["keys"].tobytes())) == expected


def test_one_layer_carries_the_kernels_however_often_it_is_asked(trt, kernels) -> None:
    plugin.register(trt, kernels)
    layers = [built(trt) for _ in range(3)]
    for one in layers:
        one.configure_plugin(*tensors(trt, one.state, SIZES))
    asked = [["cubins" in serialized(one) for one in layers] for _ in range(2)]
    assert asked == [[True, False, False]] * 2


def carrying(layers: list[Any]) -> list[list[bool]]:
    """Which of them carry the kernels, as TensorRT for RTX finds out: each is serialized for its size, then each for
    its content."""
    return [["cubins" in serialized(one) for one in layers] for _ in range(2)]


def configured(trt: ModuleType, layers: list[Any]) -> list[Any]:
    """As TensorRT for RTX builds, for two profiles: on clones of the network's layers, configured twice."""
    clones = [one.clone() for _ in range(2) for one in layers]
    for one in [*clones, *clones]:
        one.configure_plugin(*tensors(trt, one.state, SIZES))
    return clones


def test_every_network_of_a_process_carries_its_kernels_once(trt, kernels) -> None:
    """Built one after the other, parsed both before either is built, and built again: names play no part."""
    plugin.register(trt, kernels)
    first, second = ([built(trt) for _ in range(2)] for _ in range(2))
    expected = [[True, False, False, False]] * 2
    assert carrying(configured(trt, first)) == expected
    assert carrying(configured(trt, second)) == expected
    assert carrying(configured(trt, first)) == expected, "the same network again"
    plugin.register(trt, kernels)
    assert carrying(configured(trt, [built(trt) for _ in range(2)])) == expected, "a network that is parsed later"


def test_a_network_keeps_the_kernels_that_were_registered_when_it_was_parsed(trt, kernels) -> None:
    plugin.register(trt, kernels)
    first = built(trt)
    plugin.register(trt, Kernels({}, fields.pack([b"another model's"])))
    (clone, _) = configured(trt, [first])
    assert serialized(clone)["cubins"].data.tobytes() == kernels.container


def test_networks_that_are_built_at_once_carry_their_kernels_both(kernels) -> None:
    """Two threads: the calls of one come between those of the other."""
    trt = fake.module()
    plugin.register(trt, kernels)
    networks = [[built(trt) for _ in range(3)] for _ in range(2)]
    turn, found = threading.Barrier(2, timeout=20), [[], []]

    def build(number: int) -> None:
        turn.wait()
        clones = configured(trt, networks[number])
        if number:
            turn.wait()  # the other has begun to serialize
        found[number].append(["cubins" in serialized(one) for one in clones[:3]])
        if not number:
            turn.wait()
        found[number].append(["cubins" in serialized(one) for one in clones[:3]])

    threads = [threading.Thread(target=build, args=(number,)) for number in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for answers in found:
        assert any(answers[0])
        assert answers[0] == answers[1], "the content is as long as its size was said to be"


def test_an_engine_that_is_loaded_and_serialized_again_keeps_its_kernels(trt, kernels) -> None:
    creator = plugin.register(trt, kernels)
    one = built(trt)
    one.configure_plugin(*tensors(trt, one.state, SIZES))
    stored = {name: field.data for name, field in serialized(one).items()}
    plugin.register(trt)  # as a process that only loads
    for _ in range(2):  # and that again
        restored = creator.create_plugin("layer0", one.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
        one = restored.attach_to_context(None)
        again = {name: field.data for name, field in serialized(one).items()}
        assert list(again) == list(stored)
        assert again["cubins"].tobytes() == kernels.container


def test_a_restored_layer_is_the_one_that_was_serialized(trt, kernels) -> None:
    creator = plugin.register(trt, kernels)
    one = built(trt)
    one.configure_plugin(*tensors(trt, one.state, SIZES))
    stored = one.get_fields_to_serialize()
    fields.STORE._files.clear()
    restored = creator.create_plugin("layer0", stored, trt.TensorRTPhase.RUNTIME)
    assert restored.state == dataclasses.replace(one.state, building=False, container=kernels.container)
    assert set(fields.STORE._files) == set(fields.unpack(kernels.container))
    clone = restored.attach_to_context(None)
    assert clone.state == restored.state
    assert clone is not restored


@pytest.mark.parametrize(("name", "value", "code"), [
    ("contract_version", 2, "E-ENGINE-OP-VERSION"), ("keys", b"nonsense\n", "E-ENGINE-KERNEL-KEYS"),
    ("cubins", b"gqa-cubins 2\n\n", "E-ENGINE-KERNEL-CONTAINER"), ("num_heads", 7, "E-ENGINE-LAYER-VALUES"),
    ("page_size", 16, "E-ENGINE-LAYER-FIELDS")])
def test_fields_of_another_version_are_refused_and_the_reason_is_kept(name: str, value: Any, code: str) -> None:
    trt = fake.module()
    creator = plugin.register(trt)
    values = dict(State(LLAMA, building=False).to_fields_by_name())
    values[name] = value
    kinds = {**dict(fields.SERIALIZED), "page_size": "int32"}
    stored = [trt.PluginField(key, np.frombuffer(one, np.int8) if kinds[key] == "char" else np.array([one]),
                              trt.PluginFieldType.INT32) for key, one in values.items()]
    with refused(code) as caught:
        creator.create_plugin("layer3", stored, trt.TensorRTPhase.RUNTIME)
    assert plugin.failures == [caught.error]
    assert caught.error.fix


def test_a_missing_field_is_named() -> None:
    values = dict(State(LLAMA, building=False).to_fields_by_name())
    for name in ("keys", "contract_version", "window"):
        with refused("E-ENGINE-LAYER-FIELDS"):
            State.from_fields({key: one for key, one in values.items() if key != name}, "layer 0")


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    state = State(LLAMA, building=True)
    trt = fake.module()
    good = [tensor.dims for tensor in tensors(trt, state, SIZES)[0]]
    plugin_layer.check_shapes(state, good)
    wrong = ((0, (2, 1, 500), "query has 500 features, expected 512"), (1, (2, 1, 64), "key has 64 features"),
             (3, (2, 3, 1024, 64), "past_key has 3 heads"))
    for place, shape, message in wrong:
        with refused("E-ENGINE-LAYER-SHAPES") as caught:
            plugin_layer.check_shapes(state, [*good[:place], shape, *good[place + 1:]])
        assert message in caught.error.what


@pytest.mark.parametrize(("changes", "words"), [
    ({"head": 257}, "head size 257 is outside 1 .. 256"), ({"value_head": 300}, "head size 300 is outside 1 .. 256"),
    ({"capacity": 2**25}, "capacity 33554432 times head size 64 exceeds"),
    ({"batch": 65536}, "CUDA grids end at 65535")])
def test_sizes_that_no_launch_holds_are_refused_while_building_and_at_run_time(gpu, kernels, changes: dict,
                                                                             words: str) -> None:
    cuda = gpu()
    sizes = dataclasses.replace(SIZES, **changes)
    trt, one = restored(kernels)
    for call in (lambda: built(trt).configure_plugin(*tensors(trt, one.state, sizes)),
                 lambda: one.on_shape_change(*tensors(trt, one.state, sizes)), lambda: enqueue(trt, one, sizes)):
        with refused("E-ENGINE-LAYER-LIMITS") as caught:
            call()
        assert words in caught.error.what
    assert not [call for call in cuda.calls if call[0] == "launch"]


def test_limits_are_those_of_the_cpp_plugin() -> None:
    header = (ROOT / "plugins" / "cpp" / "gqa" / "attention" / "layer.h").read_text(encoding="utf-8")
    found = dict(re.findall(r"std::int64_t (kMax\w+) = (.+?);", header))
    assert found["kMaxHead"] == str(limits.MAX_HEAD)
    assert found["kMaxGridYz"] == str(limits.MAX_GRID_YZ)
    assert found["kMaxHeadElements"] == "(std::int64_t{1} << 31) - (1 << 16)"
    assert limits.MAX_HEAD_ELEMENTS == (1 << 31) - (1 << 16)


@pytest.mark.parametrize(("place", "shape"), [(3, (2, 2, 1024)), (4, (2, 2, 1024, 64, 1)), (0, (2, 512)), (5, ())])
def test_inputs_of_another_rank_are_refused(place: int, shape: tuple[int, ...]) -> None:
    state = State(LLAMA, building=True)
    good = [tensor.dims for tensor in tensors(fake.module(), state, SIZES)[0]]
    with refused("E-ENGINE-LAYER-SHAPES") as caught:
        plugin_layer.check_shapes(state, [*good[:place], shape, *good[place + 1:]])
    assert f"{state.inputs[place]} has {len(shape)} dimensions" in caught.error.what


def test_a_kernel_that_was_not_compiled_is_refused_while_building(kernels) -> None:
    trt = fake.module()
    plugin.register(trt, kernels)
    one = built(trt)
    with refused("E-ENGINE-KERNEL-MISSING"):
        one.configure_plugin(*tensors(trt, one.state, dataclasses.replace(SIZES, head=96)))


def test_the_workspace_is_that_of_the_largest_shapes(trt) -> None:
    one = built(trt)
    assert one.get_workspace_size(*tensors(trt, one.state, SIZES)) == launch.workspace_bytes(LLAMA, SIZES)


@pytest.fixture
def gpu(monkeypatch) -> Callable[..., fake.Driver]:
    def put(**facts: Any) -> fake.Driver:
        made = fake.Driver(**facts)
        for name, module in (("cuda", ModuleType("cuda")), ("cuda.bindings", ModuleType("cuda.bindings")),
                             ("cuda.bindings.driver", made)):
            monkeypatch.setitem(sys.modules, name, module)
        sys.modules["cuda.bindings"].driver = made
        return made

    return put


def restored(kernels: Kernels, layer: Layer = LLAMA) -> tuple[ModuleType, Any]:
    trt = fake.module()
    creator = plugin.register(trt, kernels)
    state = State(layer, building=False, keys=kernels.of(layer, SIZES))
    return trt, plugin._plugin_class(trt, {})(state, creator.carriers)


def enqueue(trt: ModuleType, one: Any, sizes: Sizes, **moved: int) -> dict[str, int]:
    """Run it at made-up addresses; returns those."""
    inputs, outputs = tensors(trt, one.state, sizes)
    addresses = {name: 4096 * (place + 1) for place, name in enumerate((*one.state.inputs, "output"))}
    addresses |= {"present_key": addresses["past_key"], "present_value": addresses["past_value"], **moved}
    one.enqueue(inputs, outputs, [addresses[name] for name in one.state.inputs],
                [addresses[name] for name in one.state.outputs], 1 << 30, 99)
    return addresses


def test_enqueue_launches_what_launch_says_with_the_gpu_s_own_kernels(gpu, kernels) -> None:
    cuda = gpu(capability=89, sm_count=58)
    trt, one = restored(kernels)
    addresses = enqueue(trt, one, SIZES)
    launched = [call for call in cuda.calls if call[0] == "launch"]
    assert [call[1].split(" in module of ")[1] for call in launched] == ["append-89", "decode-89", "combine-89"]
    expected = launch.launches(LLAMA, SIZES, one.loaded.cubins, addresses, 1 << 30, 58)
    for call, right in zip(launched, expected, strict=True):
        assert call[2] == (*right.grid, 128, 1, 1, 60000, 99)
        assert call[3][-2:] == [None, None], "Triton's two scratch pointers are null"
        assert call[3][:-2] == pytest.approx([value for _, value in right.arguments])


def test_kernels_are_loaded_once_before_a_graph_is_captured(gpu, kernels) -> None:
    cuda = gpu()
    trt, one = restored(kernels)
    assert not cuda.calls, "nothing is loaded before the shapes are known"
    one.on_shape_change(*tensors(trt, one.state, SIZES))
    loads = [call for call in cuda.calls if call[0] == "load"]
    assert len(loads) == 4
    assert {call[2:] for call in cuda.calls if call[0] == "shared"} == {(8, 60000)}
    before = len(cuda.calls)
    enqueue(trt, one, SIZES)
    enqueue(trt, one.attach_to_context(None), SIZES)
    assert {call[0] for call in cuda.calls[before:]} == {"launch"}, "capture forbids everything else"


def test_a_long_prompt_takes_the_prefill_kernel(gpu, kernels) -> None:
    cuda = gpu()
    trt, one = restored(kernels)
    enqueue(trt, one, dataclasses.replace(SIZES, steps=200))
    assert [call[1].split(" ")[0] for call in cuda.calls if call[0] == "launch"] == ["append_kernel", "prefill_kernel"]


def test_a_cache_that_is_not_written_in_place_is_an_error_not_a_wrong_answer(gpu, kernels) -> None:
    cuda = gpu()
    trt, one = restored(kernels)
    with refused("E-ENGINE-ALIAS"):
        enqueue(trt, one, SIZES, present_value=1 << 20)
    assert not [call for call in cuda.calls if call[0] == "launch"]


def test_a_layer_that_is_timed_while_an_engine_is_built_takes_buffers_apart(gpu, kernels) -> None:
    """TensorRT may time it so; a refusal would leave it without a tactic. The kernels are those it will carry."""
    cuda = gpu()
    trt = fake.module()
    plugin.register(trt, kernels)
    (one, _) = configured(trt, [built(trt)])
    one = one.attach_to_context(None)
    enqueue(trt, one, SIZES, present_key=1 << 20, present_value=1 << 21)
    assert [call[1].split(" ")[0] for call in cuda.calls if call[0] == "launch"] == [
        "append_kernel", "decode_kernel", "combine_kernel"]


def test_a_context_at_the_address_of_one_that_is_gone_gets_kernels_of_its_own(gpu, kernels) -> None:
    cuda = gpu()
    trt, one = restored(kernels)
    enqueue(trt, one, SIZES)
    loads = [call for call in cuda.calls if call[0] == "load"]
    cuda.context_id += 1  # destroyed and made again, at the same address
    enqueue(trt, one, SIZES)
    assert len([call for call in cuda.calls if call[0] == "load"]) == 2 * len(loads)


def test_a_gpu_that_the_engine_was_not_built_for_is_told_what_to_build(gpu, kernels) -> None:
    gpu(capability=120)
    trt, one = restored(kernels)
    with refused("E-ENGINE-CAPABILITY") as caught:
        one.on_shape_change(*tensors(trt, one.state, SIZES))
    assert "--compute-capability 12.0" in caught.error.fix


def test_what_the_driver_refuses_is_named(gpu, kernels) -> None:
    cuda = gpu()
    trt, one = restored(kernels)
    cuda.refuses = "load"
    with refused("E-ENGINE-DRIVER"):
        enqueue(trt, one, SIZES)


def test_without_bindings_and_without_a_driver_the_fix_is_named(monkeypatch, kernels) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(driver_ctypes, "opened", lambda: driver_ctypes.Driver("libnothing.so.1"))
    trt, one = restored(kernels)
    with refused("E-ENV-CUDA-BINDINGS") as caught:
        enqueue(trt, one, SIZES)
    assert "gqa-export[plugins]" in caught.error.fix


def test_shapes_in_the_build_phase_touch_no_driver(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    trt = fake.module()
    one = built(trt)
    one.on_shape_change(*tensors(trt, one.state, SIZES))
    assert one.loaded is None


def test_neither_library_is_an_error_with_the_command(monkeypatch) -> None:
    for name in plugin.MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    with refused("E-ENV-TENSORRT") as caught:
        plugin.discover()
    assert "gqa-export[rtx]" in caught.error.fix


def test_a_fault_of_ours_in_a_callback_is_kept_too() -> None:
    trt = fake.module()
    one = built(trt)
    with pytest.raises(AttributeError):
        one.configure_plugin([1, 2], [])
    assert "configure_plugin" in plugin.failures[0].where
