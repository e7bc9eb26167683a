"""libgqa_plugin.so driven as TensorRT drives it (probe_plugin.cpp), held to Python's plugin. Needs TensorRT's
headers."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from gqa_plugins.grouped_attention import fields, launch
from gqa_plugins.grouped_attention.coded_layer import CodedLayer
from gqa_plugins.grouped_attention.fields import Key
from gqa_plugins.grouped_attention.launch import Layer, Sizes
from gqa_plugins.grouped_attention.long_layer import LongLayer
from gqa_plugins.grouped_attention.tensorrt import State
from refusal import refused

from gqa_export.attention_op import CACHE_CODES
from gqa_export.long_attention_op import OWN_ATTRIBUTES, LongSetting

from .conftest import Programs
from .made_kernels import make_kernels, random_coded_layer, random_layer, random_long_layer
from .test_attention import expected_launch, logged_launch

LAYER = Layer(8, 2, 0.125, 0.0, 0, 0, 0, 0, 0, 1)
SIZES = Sizes(1, 1, 256, 64, 64, "fp16")
CAPABILITY, SM_COUNT = 89, 128


@pytest.fixture
def chance() -> random.Random:
    return random.Random(20260101)


class Driven:
    """One process of probe_plugin over a script, its answers and its log."""

    def __init__(self, programs: Programs, folder: Path, lines: Iterable[str], version: str = "1",
                 **environment: str | Path) -> None:
        log = folder / "log"
        log.write_text("")
        output = programs.run("probe_plugin", programs.plugin_library, version, stdin="\n".join(lines) + "\n",
                              GQA_STUB_LOG=log, GQA_STUB_CAPABILITY=str(CAPABILITY), GQA_STUB_SMS=str(SM_COUNT),
                              **environment)
        self.said = output.splitlines()
        self.launches = [logged_launch(line) for line in log.read_text().splitlines() if line.startswith("launch")]


def packed(kind: str, value: Any) -> bytes:
    return {"int32": lambda: struct.pack("i", value), "int64": lambda: struct.pack("q", value),
            "float32": lambda: struct.pack("f", value), "char": lambda: bytes(value)}[kind]()


def field_lines(made: Iterable[tuple[str, str, Any]]) -> list[str]:
    return [f"field {name} {kind} {packed(kind, value).hex()}" for name, kind, value in made]


def attributes(layer: Layer) -> list[tuple[str, str, Any]]:
    """As the ONNX parser hands them over: the node's identity too."""
    return [*((name, kind, getattr(layer, name)) for name, kind in fields.CREATION),
            ("plugin_version", "char", b"1"), ("plugin_namespace", "char", b"gqa")]


def serialized(layer: Layer, keys: tuple[Key, ...], container: bytes = b"") -> list[tuple[str, str, Any]]:
    """What Python's plugin writes into an engine."""
    return State(layer, building=False, keys=tuple(sorted(keys)), container=container).to_fields()


def shapes(layer: Layer, sizes: Sizes) -> dict[str, Sequence[int]]:
    every = {"query": (sizes.batch, sizes.steps, layer.num_heads * sizes.head),
             "key": (sizes.batch, sizes.steps, layer.kv_num_heads * sizes.head),
             "value": (sizes.batch, sizes.steps, layer.kv_num_heads * sizes.value_head),
             "past_key": (sizes.batch, layer.kv_num_heads, sizes.capacity, sizes.head),
             "past_value": (sizes.batch, layer.kv_num_heads, sizes.capacity, sizes.value_head),
             "past_lengths": (sizes.batch,), "new_lengths": (sizes.batch,),
             "cos": (sizes.max_position, sizes.rotary_half), "sin": (sizes.max_position, sizes.rotary_half),
             "sinks": (layer.num_heads,), "projections": (sizes.head, sizes.projections),
             "code_order": (1 << sizes.projections,)}
    if layer.long is not None:
        every["fractions"] = (layer.kv_num_heads, layer.long.samples)
    return {name: every[name] for name in fields.node_inputs(asdict(layer))}


def dims_text(layer: Layer, sizes: Sizes) -> str:
    return ";".join(",".join(map(str, shape)) for shape in shapes(layer, sizes).values())


def test_library_exports_two_functions_and_needs_no_driver(tensorrt_programs: Programs) -> None:
    names = subprocess.run(["nm", "-D", "--defined-only", str(tensorrt_programs.plugin_library)], capture_output=True,
                           text=True, check=True).stdout
    exported = {line.split()[2] for line in names.splitlines() if line.split()[1] == "T"}
    assert exported == {"getCreators", "setLoggerFinder"}
    needed = subprocess.run(["ldd", str(tensorrt_programs.plugin_library)], capture_output=True, text=True,
                            check=True).stdout
    assert not [name for name in ("cuda", "nvinfer", "tensorrt", "not found") if name in needed]


def test_creator_and_node_are_those_of_python(tensorrt_programs: Programs, tmp_path: Path) -> None:
    no_new = Layer(**{**asdict(LAYER), "has_new": 0})
    said = Driven(tensorrt_programs, tmp_path, [
        "creator", *field_lines(attributes(LAYER)), "create build", "outputs", "formats",
        *field_lines(attributes(no_new)), "create build", "outputs"]).said
    creation = " ".join(f"{name}:{kind}" for name, kind in fields.CREATION)
    inputs = fields.node_inputs(asdict(LAYER))
    half, lengths = "100000", "000100"
    # Query alone may be of any type; all others are of the query's, the lengths int32; linear layout only.
    formats = ["111000", *(lengths if name.endswith("lengths") else half for name in inputs[1:]), half, half, half, "0"]
    assert said == [f"{fields.NAME} {fields.PLUGIN_VERSION} {fields.NAMESPACE} {creation}", "made",
                    f"3 -1 {inputs.index('past_key')} {inputs.index('past_value')}", " ".join(formats), "made", "1 -1"]


@pytest.mark.parametrize(("cache", "taken"), [("int8", "000010"), ("fp8", "000001")])
def test_a_layer_of_version_3_takes_codes_where_its_cache_is_and_nowhere_else(
        tensorrt_programs: Programs, tmp_path: Path, cache: str, taken: str) -> None:
    layer = CodedLayer(**asdict(LAYER), cache_codes=CACHE_CODES[cache], key_scale=0.5, value_scale=0.25)
    made = [(name, kind, getattr(layer, name)) for name, kind in fields.CREATION_OF["3"]]
    said = Driven(tensorrt_programs, tmp_path, ["creator", *field_lines(made), "create build", "types", "formats"],
                  "3").said
    half, lengths = "100000", "000100"
    of = {"past_lengths": lengths, "new_lengths": lengths, "past_key": taken, "past_value": taken}
    inputs = fields.node_inputs(asdict(layer))
    assert said[0].startswith(f"{fields.NAME} 3 {fields.NAMESPACE} ")
    assert said[1:3] == ["made", f"query's {cache} {cache}"]
    assert said[3].split()[1:] == [*(of.get(name, half) for name in inputs[1:]), half, taken, taken, "0"]


def test_a_creator_of_version_3_refuses_what_no_codes_have(tensorrt_programs: Programs, tmp_path: Path) -> None:
    layer = CodedLayer(**asdict(LAYER), cache_codes=1, key_scale=0.5, value_scale=0.25)
    wrong = {"cache_codes": 0}, {"cache_codes": 3}, {"key_scale": 0.0}, {"value_scale": float("nan")}, {"growing": 1}
    lines = []
    for change in ({}, *wrong):
        made = [(name, kind, {**asdict(layer), **change}[name]) for name, kind in fields.CREATION_OF["3"]]
        lines += [*field_lines(made), "create build"]
    every = Driven(tensorrt_programs, tmp_path, lines, "3").said
    assert [line for line in every if line in ("made", "refused")] == ["made", *["refused"] * len(wrong)]
    for change in wrong[:4]:
        with refused("E-ENGINE-LAYER-VALUES"):
            CodedLayer.from_fields({**asdict(layer), **change})


@pytest.mark.parametrize(("version", "make"), [
    ("1", random_layer), ("2", random_long_layer), ("3", random_coded_layer)])
def test_layers_that_python_serialized_launch_what_python_launches(tensorrt_programs: Programs, tmp_path: Path,
                                                                   chance: random.Random, version: str,
                                                                   make: Callable) -> None:
    """Fields of the one, enqueue of the other: 40 random layers of each version, their kernels carried by another
    layer, which is restored before them or after."""
    other = {"1": LAYER, "2": LongLayer(**asdict(LAYER), **dict.fromkeys(OWN_ATTRIBUTES, 0)),
             "3": CodedLayer(**asdict(LAYER), cache_codes=1, key_scale=1.0, value_scale=1.0)}[version]
    lines, launched = [], []
    for _ in range(40):
        layer, sizes = make(chance)
        keys, cubins, container = make_kernels(layer, sizes, (CAPABILITY,), chance)
        carrier = [*field_lines(serialized(other, (), container)), "create runtime"]
        restored = [*field_lines(serialized(layer, keys)), "create runtime"]
        lines += chance.choice(([*carrier, *restored], [*restored, *carrier, "previous"]))
        lines.append(f"run {sizes.dtype} {dims_text(layer, sizes)}")
        inputs = fields.node_inputs(asdict(layer))
        pointers = {name: 4096 * (index + 1) for index, name in enumerate(inputs)} | {"output": 1 << 20}
        picked = {key.kernel: cubins[key.sha256] for key in keys}
        launched += [expected_launch(one)
                     for one in launch.launches(layer, sizes, picked, pointers, 1 << 24, SM_COUNT)]
    driven = Driven(tensorrt_programs, tmp_path, lines, version)
    assert set(driven.said) == {"made", "0 0"}
    assert driven.said.count("0 0") == 40
    assert driven.launches == launched


def test_a_creator_of_version_2_refuses_what_approximates_nothing_and_the_first_refuses_its_fields(
        tensorrt_programs: Programs, tmp_path: Path) -> None:
    good = LongSetting("tiles", leaf=64, heavy_keys=32, samples=8, tile=32, block=16, score_rows=4)
    wrong = {"window": 16}, {"method": 3}, {"leaf": 60}, {"samples": 0}, {"exact_steps": -1}
    layer = LongLayer(**asdict(LAYER), **good.attributes())
    lines = []
    for change in ({}, *wrong):
        made = [(name, kind, {**asdict(layer), **change}[name]) for name, kind in fields.LONG_CREATION]
        lines += [*field_lines(made), "create build"]
    def said(lines: list[str], version: str) -> list[str]:
        every = Driven(tensorrt_programs, tmp_path, lines, version).said
        return [line for line in every if line in ("made", "refused")]

    assert said(lines, "2") == ["made", *["refused"] * len(wrong)]
    assert said(lines[: len(fields.LONG_CREATION) + 1], "1") == ["refused"]
    assert said([*field_lines(attributes(LAYER)), "create build"], "2") == ["refused"]


def test_fields_serialize_as_python_serializes_them(tensorrt_programs: Programs, tmp_path: Path,
                                                    chance: random.Random) -> None:
    for _ in range(5):
        layer, sizes = random_layer(chance)
        keys, _, _ = make_kernels(layer, sizes, (80, 89), chance)
        made = serialized(layer, keys)
        said = Driven(tensorrt_programs, tmp_path, [*field_lines(made), "create runtime", "serialize"]).said
        expected = [f"{name} {kind} {packed(kind, value).hex()}" for name, kind, value in made]
        assert said == ["made", *expected, "--"]


def changed(made: list[tuple[str, str, Any]], **values: Any) -> list[tuple[str, str, Any]]:
    return [(name, kind, values.get(name, value)) for name, kind, value in made]


@pytest.mark.parametrize(("change", "words"), [
    (lambda made: changed(made, contract_version=2), "the engine's attention layers follow version 2 of the op"),
    (lambda made: made[1:], "lacks or does not know: num_heads"),
    (lambda made: [*made, ("rope_base", "int32", 1)], "lacks or does not know: rope_base"),
    (lambda made: [one for one in made if one[0] != "keys"], "lacks or does not know: keys"),
    (lambda made: changed(made, num_heads=7), "7 query heads cannot be grouped over 2 key/value heads"),
    (lambda made: changed(made, growing=1), "the plugin writes into a static cache or a ring, and growing is 1"),
    (lambda made: changed(made, growing=2), "a ring holds what a window sees, and this layer has none"),
    (lambda made: changed(made, window=-1), "window and softcap are 0 or more"),
    (lambda made: changed(made, keys=b"append 89"), "the engine's list of kernels is cut short"),
    (lambda made: [*made, ("cubins", "char", b"rubbish")], "not in a container of this version"),
    (lambda made: [("num_heads", "float32", 8.0), *made[1:]], "plugin field num_heads is not one number of its type"),
])
def test_layer_that_cannot_be_restored_is_refused_and_logged(tensorrt_programs: Programs, tmp_path: Path, change,
                                                             words: str) -> None:
    lines = [*field_lines(change(serialized(LAYER, ()))), "create runtime layer7"]
    said = Driven(tensorrt_programs, tmp_path, lines).said
    assert said[-1] == "refused"
    assert said[0].startswith("gqa::GroupedQueryAttention, layer layer7: ")
    assert words in said[0]
    assert "|  fix: " in said[0]


def test_failures_at_run_time_are_results_and_logged_never_exceptions(tensorrt_programs: Programs, tmp_path: Path,
                                                                      chance: random.Random) -> None:
    keys, _, container = make_kernels(LAYER, SIZES, (CAPABILITY,), chance)
    restored = [*field_lines(serialized(LAYER, keys, container)), "create runtime"]
    run = f"run fp16 {dims_text(LAYER, SIZES)}"
    orphan = Driven(tensorrt_programs, tmp_path, [*field_lines(serialized(LAYER, keys)), "create runtime", run]).said
    assert orphan[-1] == "1 1"
    assert "is in no layer that was loaded" in orphan[1]
    apart = Driven(tensorrt_programs, tmp_path, [*restored, f"{run} apart"]).said
    assert apart[-1] == "0 1"
    assert "the cache would not be written in place" in apart[1]
    failing = Driven(tensorrt_programs, tmp_path, [*restored, run], GQA_STUB_FAIL="cuModuleLoadData").said
    assert failing[-1] == "1 1"
    assert "loading kernel append failed" in failing[1]


def test_engine_is_built_with_the_kernels_of_a_folder(tensorrt_programs: Programs, tmp_path: Path,
                                                               chance: random.Random) -> None:
    """GQA_KERNELS: two layers of one network; the first carries the kernels of all, both name their own."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    windowed = Layer(**{**asdict(LAYER), "window": 64})
    cubins: dict[str, Any] = {}
    keys: dict[Layer, tuple[Key, ...]] = {}
    for layer in (LAYER, windowed):
        keys[layer], made, container = make_kernels(layer, SIZES, (80, CAPABILITY), chance)
        cubins |= made
        for sha, data in fields.unpack(container).items():
            (folder / f"{sha}.gqacubin").write_bytes(data)
    (folder / "notes.txt").write_text("not a kernel")
    both = list(enumerate((LAYER, windowed)))
    build = [line for number, layer in both
             for line in (*field_lines(attributes(layer)), f"create build layer{number}", "keep")]
    build += [line for number, layer in both for line in (f"swap {number}", f"configure fp16 {dims_text(layer, SIZES)}",
                                                          f"swap {number}")]
    build += [line for number, _ in both for line in (f"swap {number}", "serialize", f"swap {number}")]
    said = Driven(tensorrt_programs, tmp_path, build, GQA_KERNELS=folder).said
    assert said[:4] == ["made", "made", *(f"0 {launch.workspace_bytes(layer, SIZES)}" for layer in (LAYER, windowed))]
    written = [{line.split()[0]: line.split()[1:] for line in lines.split("\n") if line}
               for lines in "\n".join(said[4:]).split("--")[:2]]
    assert [list(one) for one in written] == [[name for name, _ in fields.SERIALIZED],
                                              [name for name, _ in fields.SERIALIZED if name != "cubins"]]
    carried = fields.unpack(bytes.fromhex(written[0]["cubins"][1]))
    assert set(carried) == set(cubins)
    for layer, one in zip((LAYER, windowed), written, strict=True):
        named = fields.parse_keys(bytes.fromhex(one["keys"][1]))
        attention = [key for key in keys[layer] if key.kernel in ("prefill", "decode")]
        assert {key for key in named if key.kernel in ("prefill", "decode")} == set(attention)
        assert {key.kernel for key in named} == set(launch.variants(LAYER, SIZES))


def kernel_folder(tmp_path: Path, chance: random.Random, layer: Layer = LAYER) -> Path:
    folder = tmp_path / "kernels"
    folder.mkdir(exist_ok=True)
    for sha, data in fields.unpack(make_kernels(layer, SIZES, (CAPABILITY,), chance)[2]).items():
        (folder / f"{sha}.gqacubin").write_bytes(data)
    return folder


def carried(said: Sequence[str]) -> list[bool]:
    """Of every layer that was serialized, in order, whether it carries the kernels."""
    text = "\n".join(said)
    return ["\ncubins char " in f"\n{part}" for part in text.split("\n--")[:-1]]


def test_every_network_of_a_process_carries_its_kernels_once(tensorrt_programs: Programs, tmp_path: Path,
                                                             chance: random.Random) -> None:
    """Two networks of other layer names: one after the other, both parsed before either is built, one built twice."""
    folder = kernel_folder(tmp_path, chance)
    names = ("model.layers.0.attn", "model.layers.1.attn", "transformer.h.0.attn", "transformer.h.1.attn")
    parsed = [line for name in names for line in (*field_lines(attributes(LAYER)), f"create build {name}", "keep")]
    configure = f"configure fp16 {dims_text(LAYER, SIZES)}"

    def build(*layers: int) -> list[str]:
        return [line for command in (configure, "serialize", "serialize") for layer in layers
                for line in (f"swap {layer}", command, f"swap {layer}")]

    at_once = Driven(tensorrt_programs, tmp_path, [*parsed, *build(0, 1), *build(2, 3), *build(0, 1)],
                     GQA_KERNELS=folder).said
    assert carried(at_once) == [True, False] * 6
    in_turn = Driven(tensorrt_programs, tmp_path, [*parsed[:len(parsed) // 2], *build(0, 1),
                                                   *parsed[len(parsed) // 2:], *build(2, 3)], GQA_KERNELS=folder).said
    assert carried(in_turn) == [True, False] * 4


def test_engine_that_is_loaded_and_serialized_again_keeps_its_kernels(tensorrt_programs: Programs, tmp_path: Path,
                                                                      chance: random.Random) -> None:
    keys, _, container = make_kernels(LAYER, SIZES, (CAPABILITY,), chance)
    made = serialized(LAYER, keys, container)
    said = Driven(tensorrt_programs, tmp_path, [*field_lines(made), "create runtime", "serialize", "serialize"]).said
    expected = [*(f"{name} {kind} {packed(kind, value).hex()}" for name, kind, value in made), "--"]
    assert said == ["made", *expected, *expected]


def test_layer_is_timed_while_an_engine_is_built(tensorrt_programs: Programs, tmp_path: Path,
                                                 chance: random.Random) -> None:
    """TensorRT runs it on the GPU to choose a tactic, perhaps with outputs in buffers of their own."""
    folder = kernel_folder(tmp_path, chance)
    shape = dims_text(LAYER, SIZES)
    driven = Driven(tensorrt_programs, tmp_path, [
        *field_lines(attributes(LAYER)), "create build layer0", f"configure fp16 {shape}", f"run fp16 {shape}",
        f"run fp16 {shape} apart"], GQA_KERNELS=folder)
    assert driven.said[-2:] == ["0 0", "0 0"]
    assert len(driven.launches) == 2 * 3


def test_context_at_the_address_of_one_that_is_gone_gets_kernels_of_its_own(tensorrt_programs: Programs, tmp_path: Path,
                                                                            chance: random.Random) -> None:
    keys, _, container = make_kernels(LAYER, SIZES, (CAPABILITY,), chance)
    run = f"run fp16 {dims_text(LAYER, SIZES)}"
    driven = Driven(tensorrt_programs, tmp_path, [*field_lines(serialized(LAYER, keys, container)), "create runtime",
                                                  run, f"{run} again", "context 2", f"{run} again"])
    assert driven.said == ["made", "0 0", "0 0", "0 0"]
    log = (tmp_path / "log").read_text().splitlines()
    loads = [number for number, line in enumerate(log) if line.startswith("module loaded")]
    launches = [number for number, line in enumerate(log) if line.startswith("launch")]
    assert len(loads) == 2 * 4
    assert loads[3] < launches[0] < launches[5] < loads[4], "loaded again for the new context, not for the second run"
    assert not [line for line in log if line.startswith("module unloaded")][:-4], "the old ones went with their context"


@pytest.mark.parametrize(("changes", "words"), [
    ({"head": 257}, "head size 257 is outside 1 .. 256"), ({"value_head": 300}, "head size 300 is outside 1 .. 256"),
    ({"capacity": 2**25}, "capacity 33554432 times head size 64 exceeds 2147418112 elements"),
    ({"batch": 65536}, "B = 65536, K = 2: CUDA grids end at 65535")])
def test_sizes_that_no_launch_holds_are_refused(tensorrt_programs: Programs, tmp_path: Path, chance: random.Random,
                                                changes: dict[str, int], words: str) -> None:
    keys, _, container = make_kernels(LAYER, SIZES, (CAPABILITY,), chance)
    text = dims_text(LAYER, replace(SIZES, **changes))
    built = Driven(tensorrt_programs, tmp_path, [*field_lines(attributes(LAYER)), "create build layer0",
                                                 f"configure fp16 {text}"], GQA_KERNELS=kernel_folder(tmp_path, chance))
    assert words in built.said[1]
    assert built.said[-1].startswith("1 ")
    ran = Driven(tensorrt_programs, tmp_path, [*field_lines(serialized(LAYER, keys, container)), "create runtime",
                                               f"run fp16 {text}"])
    assert words in ran.said[1]
    assert ran.said[-1] == "1 1"
    assert not ran.launches


@pytest.mark.parametrize(("old", "new", "words"), [
    ("1,2,256,64;1,2,256,64", "1,2,256;1,2,256,64", "past_key has 3 dimensions, expected 4"),
    ("1,1,512", "512", "query has 1 dimensions, expected 3")])
def test_inputs_of_another_rank_are_refused(tensorrt_programs: Programs, tmp_path: Path, chance: random.Random,
                                            old: str, new: str, words: str) -> None:
    text = dims_text(LAYER, SIZES)
    assert old in text
    said = Driven(tensorrt_programs, tmp_path, [*field_lines(attributes(LAYER)), "create build layer0",
                                                f"configure fp16 {text.replace(old, new, 1)}"],
                  GQA_KERNELS=kernel_folder(tmp_path, chance)).said
    assert words in said[1]


def test_building_without_kernels_or_with_wrong_shapes_is_refused(tensorrt_programs: Programs, tmp_path: Path) -> None:
    made = [*field_lines(attributes(LAYER)), "create build layer0"]
    none = Driven(tensorrt_programs, tmp_path, [*made, f"configure fp16 {dims_text(LAYER, SIZES)}"]).said
    assert "there are no kernels to build the engine with" in none[1]
    assert none[-1].startswith("1 ")
    (tmp_path / "empty").mkdir()
    empty = Driven(tensorrt_programs, tmp_path, [*made, f"configure fp16 {dims_text(LAYER, SIZES)}"],
                   GQA_KERNELS=tmp_path / "empty").said
    assert "the folder has no append kernel for 8 heads, 2 key/value heads, head size 64, fp16" in empty[1]
    wrong = dims_text(LAYER, SIZES).replace("1,1,512", "1,1,511", 1)
    refused = Driven(tensorrt_programs, tmp_path, [*made, f"configure fp16 {wrong}"]).said
    assert "query has 511 features, expected 512" in refused[1]
