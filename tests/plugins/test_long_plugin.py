"""Version 2 of the plugin: what it launches for a long prompt, its fields, its tables, beside version 1 as it was."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, replace
from types import ModuleType

import fake_tensorrt as fake
import pytest
import torch
from gqa_plugins.grouped_attention import (
    choose_kernels,
    cubin,
    fields,
    launch,
    long_attend,
    long_launch,
    long_prefill,
    long_select,
    plan,
    plugin_layer,
    recipes,
)
from gqa_plugins.grouped_attention import tensorrt as plugin
from gqa_plugins.grouped_attention.launch import Layer, Sizes
from gqa_plugins.grouped_attention.layers import LAYERS
from gqa_plugins.grouped_attention.long_layer import LongLayer
from gqa_plugins.grouped_attention.plugin_layer import State
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import refused
from test_tensorrt_launch import DTYPES, LLAMA, WORKSPACE, Recorder, cubins, tensors

from gqa_export import attention_op
from gqa_export.long_attention_op import DEFAULTS, OWN_ATTRIBUTES, LongSetting

SETTINGS = {"tiles": LongSetting("tiles", leaf=64, heavy_keys=32, samples=24, anchors=3, tile=32, block=16,
                                 score_rows=4, exact_steps=4),
            "hyper": LongSetting("hyper", leaf=64, heavy_keys=16, samples=24, anchors=3, exact_steps=4)}


def long_layer(setting: LongSetting, layer: Layer = LLAMA) -> LongLayer:
    return LongLayer(**asdict(layer), **setting.attributes())


EXACT = LongLayer(**asdict(LLAMA), **dict.fromkeys(OWN_ATTRIBUTES, 0))


def long_cubins(layer: LongLayer, sizes: Sizes) -> dict[str, cubin.Cubin]:
    """As `cubins`, with those of the kernels for long prompts."""
    found = cubins(dataclasses.replace(layer, method=0), sizes)
    assert layer.long is not None
    for name, variant in launch.variants(layer, sizes).items():
        if name in long_launch.KERNELS:
            made = recipes.recipe(variant, 80)
            arguments = tuple((argument, kind.replace("T", sizes.dtype)) for argument, kind in made.arguments)
            constants = {key: str(int(value) if isinstance(value, bool) else value)
                         for key, value in made.constants.items()}
            found[name] = cubin.Cubin(name, f"{name}_kernel", 80, 0, 128, made.tile_rows, arguments, constants, b"")
    return found


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("steps", "has_sinks"), [(5, 0), (100, 1), (257, 0)])
@pytest.mark.parametrize("method", SETTINGS)
def test_launches_are_those_of_the_triton_launcher(monkeypatch, method: str, steps: int, has_sinks: int,
                                                   dtype: str) -> None:
    setting = SETTINGS[method]
    layer = long_layer(setting, replace(LLAMA, has_sinks=has_sinks, softcap=5.0 * has_sinks))
    sizes = Sizes(3, steps, 1000, 64, 48, dtype, 16, 512, 7)
    given, made = tensors(layer, sizes), long_cubins(layer, sizes)
    tables = {"fractions": torch.empty(2, setting.samples, dtype=torch.int32), "projections": torch.empty(64, 7),
              "code_order": torch.empty(128, dtype=torch.int32)}
    recorders = {name: Recorder() for name in long_launch.KERNELS}
    for module, kernel, stem in ((long_select, "score", "score"), (long_select, "select", "select"),
                                 (long_prefill, "long_prefill", "long")):
        monkeypatch.setattr(module, f"{stem}_{method}_kernel", recorders[kernel])
    long_attend.attend_long(
        given["query"], *(given[name] for name in ("past_key", "past_value", "past_lengths", "new_lengths")),
        given.get("sinks"), long_attend.LongTables(**tables), given["output"], num_heads=layer.num_heads,
        scale=layer.scale, softcap=layer.softcap, setting=setting, dtype=dtype, capability=80)
    pointers = {name: tensor.data_ptr() for name, tensor in {**given, **tables}.items()}
    ours = launch.launches(layer, sizes, made, pointers, WORKSPACE, 108)
    assert [one.cubin.kernel for one in ours] == ["append", *long_launch.KERNELS]
    bound = launch.workspace_bytes(layer, sizes)
    for one in ours[1:]:
        (grid, arguments), = recorders[one.cubin.kernel].launched
        assert one.grid == grid
        private = {"selection_ptr", "masses_ptr", "order_ptr", "query_ptr"} | (set() if has_sinks else {"sinks_ptr"})
        for (name, _), (_, value), right in zip(one.cubin.arguments, one.arguments, arguments, strict=True):
            if name in private:
                assert WORKSPACE <= value < WORKSPACE + bound
                assert value % 256 == 0
            else:
                assert value == (right.data_ptr() if isinstance(right, torch.Tensor) else right), name
        choose_kernels.check_cubin(one.cubin, layer, sizes)
    assert recorders["long_prefill"].options[0]["LEAF"] == setting.leaf


@pytest.mark.parametrize("method", SETTINGS)
def test_a_call_of_few_tokens_is_exact_and_so_is_a_layer_without_a_method(method: str) -> None:
    layer = long_layer(SETTINGS[method])
    for steps, one, kind in ((4, layer, "decode"), (5, layer, "long"), (300, layer, "long"), (5, EXACT, "decode"),
                             (300, EXACT, "prefill")):
        assert launch.choose(one, Sizes(1, steps, 1000, 64, 64, "fp16"), 16, 108)[0] == kind
    assert set(launch.variants(EXACT, Sizes(1, 1, 64, 64, 64, "fp16"))) == {"append", "prefill", "decode", "combine"}
    assert launch.workspace_bytes(EXACT, Sizes(2, 40, 64, 64, 64, "fp16", 16)) == launch.workspace_bytes(
        LLAMA, Sizes(2, 40, 64, 64, 64, "fp16", 16))


@settings(deadline=None)
@given(batch=st.integers(1, 4), steps=st.integers(5, 400), capacity=st.integers(16, 900), more=st.integers(0, 300),
       heads=st.sampled_from([(9, 3), (8, 1), (4, 4), (71, 1)]), method=st.sampled_from(list(SETTINGS)),
       rotary=st.booleans())
def test_the_workspace_holds_every_smaller_call(batch, steps, capacity, more, heads, method, rotary) -> None:
    layer = replace(long_layer(SETTINGS[method]), num_heads=heads[0], kv_num_heads=heads[1], has_rotary=int(rotary))
    sizes = Sizes(batch, steps, capacity, 64, 64, "fp16", 32 * rotary, 512, 7)
    bound = launch.workspace_bytes(layer, replace(sizes, batch=batch + 1, steps=steps + more))
    parts = long_launch.scratch_elements(SETTINGS[method], batch=batch, steps=steps, capacity=capacity,
                                         kv_heads=heads[1], group=layer.group)
    used = 2 * batch * steps * heads[0] * 64 * rotary + 4 * sum(parts)
    assert used <= bound


def test_the_kernels_have_the_constants_that_a_layer_compares() -> None:
    sizes = Sizes(1, 1, 1000, 64, 64, "fp16", 16, 64, 7)
    for method, setting in SETTINGS.items():
        layer, named = long_layer(setting), set()
        made = long_cubins(layer, sizes)
        for kernel in long_launch.KERNELS:
            named |= set(made[kernel].constants)
            choose_kernels.check_cubin(made[kernel], layer, sizes)
        assert set(long_launch.compiled_in(setting, 7, layer.group)) <= named
        another = long_layer(next(one for name, one in SETTINGS.items() if name != method))
        for kernel in ("score", "select"):
            with refused("E-ENGINE-KERNEL-MISMATCH"):
                choose_kernels.check_cubin(made[kernel], another, sizes)
        other = {"tiles": {"samples": 25}, "hyper": {"anchors": 4}}[method]
        with refused("E-ENGINE-KERNEL-MISMATCH"):
            choose_kernels.check_cubin(made["long_prefill"], replace(layer, **other), sizes)
        with refused("E-ENGINE-KERNEL-MISMATCH"):
            choose_kernels.check_cubin(made["select"], replace(layer, leaf=128), sizes)


def test_a_layer_of_version_2_reads_back_as_it_was_written_and_version_1_as_ever() -> None:
    for layer in (LLAMA, EXACT, long_layer(SETTINGS["hyper"])):
        state = State(layer, building=True)
        named = {name: value for name, _, value in state.to_fields()}
        assert [name for name, _ in fields.SERIALIZED_OF[layer.version] if name != "cubins"] == list(named)
        back = State.from_fields(named, "here", layer.version)
        assert back.layer == layer
        assert type(back.layer) is LAYERS[layer.version]
    with refused("E-ENGINE-LAYER-FIELDS"):
        Layer.from_fields(asdict(EXACT))
    with refused("E-ENGINE-LAYER-FIELDS"):
        LongLayer.from_fields(asdict(LLAMA))


@pytest.mark.parametrize("changes", [{"method": 3}, {"leaf": 60}, {"samples": 0}, {"window": 16}, {"growing": 1}],
                         ids=str)
def test_numbers_that_make_no_approximation_are_refused(changes: dict) -> None:
    with refused("E-ENGINE-LAYER-VALUES"):
        LongLayer.from_fields({**asdict(long_layer(SETTINGS["tiles"])), **changes})


def shapes(layer: LongLayer, **changes: tuple[int, ...]) -> list[tuple[int, ...]]:
    known = {"query": (1, 8, 512), "key": (1, 8, 128), "value": (1, 8, 128), "past_key": (1, 2, 512, 64),
             "past_value": (1, 2, 512, 64), "past_lengths": (1,), "new_lengths": (1,), "cos": (512, 16),
             "sin": (512, 16), "fractions": (2, 24), "projections": (64, 7), "code_order": (128,), **changes}
    return [known[name] for name in State(layer, building=True).inputs]


def test_tables_of_another_shape_and_capacities_that_nothing_holds_are_refused() -> None:
    layer = long_layer(SETTINGS["hyper"])
    state = State(layer, building=True)
    assert state.inputs[-3:] == ("fractions", "projections", "code_order")
    plugin_layer.check_shapes(state, shapes(layer))
    for wrong in ({"fractions": (2, 25)}, {"projections": (32, 7)}, {"code_order": (64,)}, {"fractions": (48,)},
                  {"past_key": (1, 2, 2048, 64)}):
        with refused("E-ENGINE-LAYER-SHAPES"):
            plugin_layer.check_shapes(state, shapes(layer, **wrong))


@pytest.fixture
def trt() -> ModuleType:
    return fake.module()


def test_all_versions_are_registered_and_each_takes_its_own_fields(trt) -> None:
    first = plugin.register(trt)
    creators = trt.get_plugin_registry().creators
    assert plugin.register(trt) is first
    assert set(creators) == {(attention_op.OP, version, "gqa") for version in ("1", "2", "3")}
    assert first is creators[attention_op.OP, "1", "gqa"]
    for version, creator in ((key[1], one) for key, one in creators.items()):
        assert [field.name for field in creator.field_names] == [name for name, _ in fields.CREATION_OF[version]]


def test_a_node_of_version_2_has_tables_of_whole_numbers_and_of_fp32(trt) -> None:
    layer = long_layer(SETTINGS["tiles"])
    one = plugin._plugin_class(trt, {})(State(layer, building=True), plugin_layer.Carriers())
    assert (one.plugin_version, one.plugin_name) == ("2", attention_op.OP)
    names = (*one.state.inputs, *one.state.outputs)
    for position, name in enumerate(names):
        wanted = (trt.DataType.INT32 if name in ("past_lengths", "new_lengths", "fractions", "code_order")
                  else trt.DataType.FLOAT if name == "projections" else trt.DataType.HALF)
        for kind in (trt.DataType.INT32, trt.DataType.FLOAT, trt.DataType.HALF):
            described = [fake.tensor((1,), trt.DataType.HALF, trt.TensorFormat.LINEAR) for _ in names]
            described[position] = fake.tensor((1,), kind, trt.TensorFormat.LINEAR)
            taken = one.supports_format_combination(position, described, len(one.state.inputs))
            # The first tensor is what the others' format is compared with: any format of numbers will do.
            assert taken == (kind == wanted or (position == 0 and kind == trt.DataType.FLOAT)), (name, kind)


def test_defaults_are_held_at_every_capability() -> None:
    for setting in DEFAULTS.values():
        assert long_launch.problem(setting, 131072, 7) == ""
        rows = long_launch.rows_of("long_prefill", setting, 4)
        keys = long_launch.choose_tiles(setting, 4, 64, 64, "bf16", 90).keys
        assert keys <= (64 if setting.method == "hyper" else 128)
        for capability in plan.CAPABILITIES:
            assert plan.choose_tiles(rows, 128, 128, "bf16", capability).rows == rows
    assert long_launch.problem(DEFAULTS["hyper"], 1 << 20, 7)
