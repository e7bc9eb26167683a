"""The plugin launches what the Triton launchers launch: same grids, same arguments; and the workspace holds it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gqa_plugins.grouped_attention import append, choose_kernels, codes, decode, launch, plan, prefill
from gqa_plugins.grouped_attention.coded_layer import CodedLayer
from gqa_plugins.grouped_attention.cubin import Cubin
from gqa_plugins.grouped_attention.fields import Key
from gqa_plugins.grouped_attention.launch import Layer, Sizes
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused

from gqa_export.errors import GqaExportError

LLAMA = Layer(num_heads=8, kv_num_heads=2, scale=0.125, softcap=0.0, window=0, rotary_interleaved=0, growing=0,
              has_rotary=1, has_sinks=0, has_new=1)
LAYERS = {
    "rotates": LLAMA,
    "window, softcap, sinks": dataclasses.replace(LLAMA, window=40, softcap=30.0, has_sinks=1, has_rotary=0),
    "multi-query, reads only": dataclasses.replace(LLAMA, kv_num_heads=1, has_new=0, has_rotary=0),
    "interleaved, reads only": dataclasses.replace(LLAMA, rotary_interleaved=1, has_new=0),
    "int8 codes": CodedLayer(*dataclasses.astuple(LLAMA), 1, 0.25, 0.0625),
    "fp8 codes, reads only": CodedLayer(*dataclasses.astuple(dataclasses.replace(LLAMA, has_new=0)), 2, 0.5, 0.125),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WORKSPACE = 1 << 40  # an address no tensor has


def cubins(layer: Layer, sizes: Sizes, capability: int = 80) -> dict[str, Cubin]:
    """Compiled files without code: what the launcher reads of them."""
    faults = append.FAULTS if layer.cache and layer.has_new else ()
    declared = {"append": append.ARGUMENTS, "prefill": prefill.ARGUMENTS, "decode": decode.ARGUMENTS,
                "combine": decode.COMBINE_ARGUMENTS}
    if layer.cache:
        declared = {"append": append.ARGUMENTS + append.CODED_ARGUMENTS + faults,
                    "prefill": prefill.ARGUMENTS + prefill.CODED_ARGUMENTS + faults,
                    "decode": decode.ARGUMENTS + decode.CODED_ARGUMENTS, "combine": decode.COMBINE_ARGUMENTS + faults}
    held = plan.CACHE_KINDS[layer.cache] if layer.cache else sizes.dtype
    shape = {"group": layer.group, "head": sizes.head, "value_head": sizes.value_head}
    kinds = {"window": layer.window > 0, "softcap": layer.softcap > 0}
    found = {}
    for name, variant in launch.variants(layer, sizes).items():
        tiles = plan.choose_tiles(max(1, variant.rows), sizes.head, sizes.value_head, sizes.dtype, capability)
        constants = {
            "append": lambda: append.constants(**shape, rotary_half=sizes.rotary_half,
                                               interleaved=bool(layer.rotary_interleaved), has_new=bool(layer.has_new)),
            "prefill": lambda t=tiles: prefill.constants(**shape, **kinds, tiles=t, sinks=bool(layer.has_sinks),
                                                         split_band=sizes.dtype != "fp32", ahead=False),
            "decode": lambda t=tiles: decode.constants(**shape, **kinds, tiles=t),
            "combine": lambda: decode.combine_constants(group=layer.group, value_head=sizes.value_head,
                                                        sinks=bool(layer.has_sinks)),
        }[name]()
        arguments = tuple((argument, kind.replace("T", sizes.dtype).replace("C", held))
                          for argument, kind in declared[name])
        found[name] = Cubin(name, f"{name}_kernel", capability, 0, 128, tiles.rows, arguments,
                            {key: str(int(value) if isinstance(value, bool) else value)
                             for key, value in constants.items()}, b"")
    return found


class Recorder:
    """Stands where a Triton kernel stands and keeps what it is launched with."""

    def __init__(self) -> None:
        self.launched: list[tuple[tuple[int, ...], list]] = []
        self.options: list[dict] = []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launched.append((grid, list(arguments)))
            self.options.append(options)

        return launch


def tensors(layer: Layer, sizes: Sizes) -> dict[str, torch.Tensor]:
    B, S, C, H, K = sizes.batch, sizes.steps, sizes.capacity, layer.num_heads, layer.kv_num_heads
    T = DTYPES[sizes.dtype]
    shapes = {"query": (B, S, H * sizes.head), "past_key": (B, K, C, sizes.head), "past_value":
              (B, K, C, sizes.value_head), "output": (B, S, H * sizes.value_head)}
    if layer.has_new:
        shapes |= {"key": (B, S, K * sizes.head), "value": (B, S, K * sizes.value_head)}
    if layer.has_rotary:
        shapes |= {"cos": (sizes.max_position, sizes.rotary_half), "sin": (sizes.max_position, sizes.rotary_half)}
    if layer.has_sinks:
        shapes["sinks"] = (H,)
    held = {name: dtype for dtype, name in codes.CACHES.items()}.get(layer.cache, T)
    found = {name: torch.empty(shape, dtype=held if name.startswith("past") else T) for name, shape in shapes.items()}
    lengths = {name: torch.zeros(B, dtype=torch.int32) for name in ("past_lengths", "new_lengths")}
    return found | lengths


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("name", list(LAYERS))
def test_launches_are_those_of_the_triton_launchers(monkeypatch, name: str, steps: int, dtype: str) -> None:
    layer = LAYERS[name]
    half = 16 if layer.has_rotary else 0
    sizes = Sizes(3, steps, 2048, 64, 48, dtype, half, 512 if half else 1)
    given, made = tensors(layer, sizes), cubins(layer, sizes)
    kind, programs = launch.choose(layer, sizes, made["decode"].tile_rows, 108)
    assert kind == ("prefill" if steps * layer.group > 128 else "decode")
    recorders = {name: Recorder() for name in made}
    for module, attribute in ((append, "append"), (prefill, "prefill"), (decode, "decode"), (decode, "combine")):
        monkeypatch.setattr(module, f"{attribute}_kernel", recorders.get(attribute, Recorder()))
    coded = None
    if layer.cache:
        coded = codes.Codes.of(given["query"], layer.kv_num_heads, *layer.scales, bool(layer.has_new))
    rotated = append.append(*(given.get(x) for x in ("query", "key", "value", "past_key", "past_value", "past_lengths",
                                                     "new_lengths", "cos", "sin")),
                            num_heads=layer.num_heads, interleaved=bool(layer.rotary_interleaved), codes=coded)
    attend = {"codes": coded, "num_heads": layer.num_heads, "scale": layer.scale, "softcap": layer.softcap,
              "window": layer.window}
    rest = [given.get(x) for x in ("past_key", "past_value", "past_lengths", "new_lengths", "sinks", "output")]
    tiles = plan.Tiles(made[kind].tile_rows, 64, 4, 1)
    if kind == "decode":
        decode.decode(rotated, *rest, **attend, tiles=tiles, programs=programs)
    else:
        prefill.prefill(rotated, *rest, **attend, tiles=tiles)

    options = [(kernel, one) for kernel, recorder in recorders.items() for one in recorder.options]
    assert options
    for kernel, one in options:
        assert one["enable_fp_fusion"] is (kernel != "combine"), "compiled as an engine's kernels are"
    expected = [(kernel, *one) for kernel, recorder in recorders.items() for one in recorder.launched]
    order = ["append", "prefill", "decode", "combine"]
    expected.sort(key=lambda one: order.index(one[0]))
    pointers = {name: tensor.data_ptr() for name, tensor in given.items()}
    ours = launch.launches(layer, sizes, made, pointers, WORKSPACE, 108)
    assert [one.cubin.kernel for one in ours] == [kernel for kernel, _, _ in expected]
    private = {"partial_ptr", "logsum_ptr", "ranges_ptr", "rotated_ptr", "faults_ptr"}
    private |= {"query_ptr", "sinks_ptr"} if layer.has_rotary else set()  # rotated queries; absent sinks point there
    for one, (kernel, grid, arguments) in zip(ours, expected, strict=True):
        assert one.grid == (*grid, *(1 for _ in range(3 - len(grid)))), kernel
        wanted = [argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
                  for argument in arguments if argument is not None]  # what a cache of numbers has no argument for
        for (argument, _), (kind_of, value), right in zip(one.cubin.arguments, one.arguments, wanted, strict=True):
            if argument in private and not (kernel == "append" and argument == "query_ptr"):
                bound = launch.workspace_bytes(layer, sizes)
                assert WORKSPACE <= value < WORKSPACE + bound or value == right
                assert value % 256 == 0 or value == right
            else:
                assert value == right, (kernel, argument, kind_of)


@given(batch=st.integers(1, 9), steps=st.integers(1, 300), capacity=st.integers(16, 20000),
       heads=st.sampled_from([(9, 3), (32, 8), (8, 1), (4, 4), (71, 1), (256, 1)]), window=st.sampled_from([0, 1, 512]),
       value_head=st.sampled_from([8, 64, 256]), sms=st.sampled_from([1, 20, 108, 132, 188, 256, 400]),
       largest=st.tuples(st.integers(0, 5), st.integers(0, 900)), rotary=st.booleans(), coded=st.booleans(),
       capability=st.sampled_from([80, 89, 120]), dtype=st.sampled_from(list(DTYPES)))
def test_workspace_holds_every_smaller_call_on_every_gpu(batch, steps, capacity, heads, window, value_head, sms,
                                                         largest, rotary, coded, capability, dtype) -> None:
    layer = dataclasses.replace(LLAMA, num_heads=heads[0], kv_num_heads=heads[1], window=window,
                                has_rotary=int(rotary))
    if coded:
        layer = CodedLayer(*dataclasses.astuple(layer), 1, 1.0, 1.0)
    sizes = Sizes(batch, steps, capacity, 64, value_head, dtype, 32 if rotary else 0, capacity)
    bound = launch.workspace_bytes(layer, dataclasses.replace(sizes, batch=batch + largest[0],
                                                              steps=steps + largest[1]))
    rows = plan.choose_tiles(layer.group, 64, value_head, dtype, capability).rows
    kind, programs = launch.choose(layer, sizes, rows, sms)
    used = batch * steps * layer.num_heads * 64 * plan.DTYPE_BYTES[dtype] if rotary else 0
    used += 4 * batch * layer.kv_num_heads * -(-steps // plan.APPEND_STEPS) if coded else 0
    if kind == "decode":
        assert 1 <= programs <= launch.SM_BOUND * plan.BLOCKS_PER_SM
        partial, logsum, ranges = plan.workspace_elements(batch, steps, layer.num_heads, layer.kv_num_heads, value_head,
                                                          rows, programs)
        used += 4 * (partial + logsum) + 8 * ranges
    assert used <= bound


def test_arguments_are_packed_with_the_two_null_pointers_that_triton_adds() -> None:
    sizes = Sizes(1, 1, 64, 64, 64, "fp16", 32, 64)
    pointers = {name: 4096 * index for index, name in enumerate(tensors(LLAMA, sizes), 1)}
    for one in launch.launches(LLAMA, sizes, cubins(LLAMA, sizes), pointers, WORKSPACE, 1):
        values, types = one.parameters()
        assert values[-2:] == (0, 0)
        assert len(values) == len(types) == len(one.cubin.arguments) + 2
        widths = {"*": 8, "i": 4, "f": 4}
        packed = [type_(value) for value, type_ in zip(values, types, strict=True)]
        assert [len(bytes(value)) for value in packed[:-2]] == [widths[kind[0]] for _, kind in one.cubin.arguments]


def keys(*capabilities: int) -> list[Key]:
    return [Key(kernel, capability, f"{capability:064d}") for capability in capabilities
            for kernel in ("append", "prefill", "decode", "combine")]


@pytest.mark.parametrize(("carried", "gpu", "taken"), [
    ((80, 89, 120), 89, 89), ((80, 89, 120), 120, 120), ((80, 120), 80, 80), ((86,), 89, 86), ((80, 86), 89, 86),
    ((80,), 87, 80), ((80, 87), 87, 87), ((87,), 87, 87), ((100, 110), 110, 110)])
def test_a_gpu_gets_the_kernels_that_run_on_it(carried: tuple[int, ...], gpu: int, taken: int) -> None:
    assert {key.capability for key in choose_kernels.pick(keys(*carried), gpu).values()} == {taken}


@pytest.mark.parametrize(("carried", "gpu"), [
    ((80, 89), 90), ((120,), 121), ((90,), 100), ((80,), 75), ((89,), 86), ((80,), 89), ((), 89), ((87,), 86),
    ((100, 103), 110), ((110,), 101), ((110,), 103), ((110,), 120)])
def test_a_gpu_that_nothing_carried_runs_on_is_told_what_to_build(carried: tuple[int, ...], gpu: int) -> None:
    with pytest.raises(GqaExportError) as caught:
        choose_kernels.pick(keys(*carried), gpu)
    assert f"--compute-capability {gpu // 10}.{gpu % 10}" in caught.value.fix


def test_a_kernel_of_another_layer_is_refused() -> None:
    sizes = Sizes(1, 1, 64, 64, 64, "fp16", 32, 64)
    made = cubins(LLAMA, sizes)
    for cubin in made.values():
        choose_kernels.check_cubin(cubin, LLAMA, sizes)
    with refused("E-ENGINE-KERNEL-MISMATCH"):
        choose_kernels.check_cubin(made["decode"], dataclasses.replace(LLAMA, window=8), sizes)
    with refused("E-ENGINE-KERNEL-MISMATCH"):
        choose_kernels.check_cubin(made["append"], LLAMA, dataclasses.replace(sizes, head=96))
    with refused("E-ENGINE-KERNEL-MISMATCH"):
        choose_kernels.check_cubin(made["prefill"], LLAMA, dataclasses.replace(sizes, dtype="bf16"))


def test_a_kernel_with_arguments_of_another_version_is_refused() -> None:
    sizes = Sizes(1, 1, 64, 64, 64, "fp16", 32, 64)
    made = cubins(LLAMA, sizes)
    made["append"] = dataclasses.replace(made["append"], arguments=(*made["append"].arguments, ("pages_ptr", "*i32")))
    pointers = dict.fromkeys(tensors(LLAMA, sizes), 4096)
    with refused("E-ENGINE-KERNEL-MISMATCH"):
        launch.launches(LLAMA, sizes, made, pointers, WORKSPACE, 1)


@pytest.mark.parametrize(("change", "code"), [
    ({"num_heads": 9, "kv_num_heads": 2}, "E-ENGINE-LAYER-VALUES"), ({"growing": 1}, "E-ENGINE-LAYER-VALUES"),
    ({"window": -1}, "E-ENGINE-LAYER-VALUES"), ({"extra": 1}, "E-ENGINE-LAYER-FIELDS"),
    ({"scale": None}, "E-ENGINE-LAYER-FIELDS")])
def test_fields_that_make_no_layer_are_refused(change: dict, code: str) -> None:
    values = {**dataclasses.asdict(LLAMA), **change}
    values = {name: value for name, value in values.items() if value is not None}
    with refused(code):
        Layer.from_fields(values)


def test_sizes_come_from_a_node_s_shapes() -> None:
    shapes = {"query": (2, 5, 512), "past_key": (2, 2, 99, 64), "past_value": (2, 2, 99, 48), "cos": (128, 16)}
    assert Sizes.from_shapes(shapes, "bf16") == Sizes(2, 5, 99, 64, 48, "bf16", 16, 128)
    del shapes["cos"]
    assert Sizes.from_shapes(shapes, "bf16").rotary_half == 0
