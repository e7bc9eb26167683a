"""The C++ plugin's own work without TensorRT: fields, kernel files, plan and launches, each held to Python's."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Iterable
from dataclasses import astuple
from pathlib import Path

import pytest
from gqa_plugins.grouped_attention import choose_kernels, fields, launch, plan
from gqa_plugins.grouped_attention.cubin import Cubin, Variant
from gqa_plugins.grouped_attention.fields import Key

from gqa_export.attention_op import RING
from gqa_export.errors import GqaExportError
from gqa_export.long_attention_op import INPUT_NAMES

from .conftest import Programs
from .made_kernels import make_cubin, make_kernels, random_coded_layer, random_layer, random_long_layer, write

GPUS = ((80, 108), (86, 84), (89, 128), (90, 132), (90, 300), (120, 170), (121, 48))  # 300: more than are filled
OUTPUT, WORKSPACE = 1 << 20, 1 << 24
ADDRESSES = {name: 4096 * (index + 1) for index, name in enumerate(INPUT_NAMES)}


@pytest.fixture
def chance() -> random.Random:
    return random.Random(20260101)


def answers(programs: Programs, what: str, paths: list[Path]) -> list[str]:
    """What `probe_attention` says of each file."""
    output = programs.run("probe_attention", what, stdin="".join(f"{path}\n" for path in paths))
    return output.split("--\n")[:-1]


def test_identity_fields_and_node_inputs_are_those_of_python(programs: Programs) -> None:
    lines = programs.run("probe_attention", "identity").splitlines()
    expected = []
    for version, creation in fields.CREATION_OF.items():
        expected.append(f"{fields.NAME} {version} {fields.NAMESPACE} {fields.CONTRACT_OF[version]}")
        expected += [f"{name} {kind}" for name, kind in creation]
    expected += [f"{name} {kind}" for name, kind in fields.SERIALIZED_ONLY]
    for number in range(16):
        rotary, sinks, new, method = (number >> bit & 1 for bit in range(4))
        flags = {"has_rotary": rotary, "has_sinks": sinks, "has_new": new, "method": method}
        names = [str(len(fields.node_outputs(flags))), *fields.node_inputs(flags)]
        expected.append(f"node {method}{rotary}{sinks}{new} {' '.join(names)}")
    assert lines == expected


def test_plan_equals_pythons_on_random_shapes(programs: Programs, chance: random.Random) -> None:
    requests, expected = [], []
    for _ in range(600):
        capability = chance.choice((75, *plan.CAPABILITIES))
        kv_heads = chance.choice((1, 2, 3, 8, 16))
        request = {"sequences": chance.choice((1, 2, 3, 16, 64)), "steps": chance.choice((1, 2, 5, 64, 513)),
                   "heads": kv_heads * chance.choice((1, 2, 3, 7, 8, 32)), "kv_heads": kv_heads,
                   "head": chance.randrange(1, 257), "value_head": chance.randrange(1, 257),
                   "dtype": chance.choice(("fp16", "bf16", "fp32")), "window": chance.choice((0, 0, 1, 512, 4096)),
                   "bound": chance.choice((1, 255, 256, 1000, 8192, 10**6)),
                   "sm_count": chance.choice((1, 4, 84, 108, 132, 170)), "capability": capability}
        requests.append(" ".join(map(str, request.values())))
        made = plan.plan(**request)
        elements = plan.workspace_elements(request["sequences"], request["steps"], request["heads"],
                                           request["kv_heads"], request["value_head"], made.tiles.rows, made.programs)
        expected.append(" ".join(map(str, (made.kind, *astuple(made.tiles), made.programs, *elements))))
    assert programs.run("probe_attention", "plan", stdin="\n".join(requests)).splitlines() == expected


def request_of(folder: Path, name: str, keys: Iterable[Key], container: bytes, layer: launch.Layer,
               sizes: launch.Sizes) -> str:
    """A line for `probe_attention enqueue`."""
    files = (write(folder, f"{name}.container", container), write(folder, f"{name}.keys", fields.keys_text(keys)))
    return " ".join(map(str, (*files, layer.version, *astuple(layer), *astuple(sizes))))


def expected_launch(one: launch.Launch) -> tuple[str, tuple[float, ...]]:
    """The log's line up to the arguments, and the arguments as the GPU gets them."""
    values = tuple(struct.unpack("f", struct.pack("f", value))[0] if kind == "fp32" else value
                   for kind, value in one.arguments)
    grid = " ".join(map(str, one.grid))
    cubin = one.cubin
    return f"launch {cubin.name} grid {grid} threads {cubin.threads} 1 1 shared {cubin.shared_bytes}", values


def logged_launch(line: str) -> tuple[str, tuple[float, ...]]:
    head, _, arguments = line.partition(" arguments ")
    return head, tuple(float.fromhex(word) if "0x" in word else int(word) for word in arguments.split())


@pytest.mark.parametrize(("make", "capability", "sm_count"), [
    *((random_layer, *gpu) for gpu in GPUS), *((random_long_layer, *gpu) for gpu in GPUS[1:4]),
    *((random_coded_layer, *gpu) for gpu in GPUS[2:5])])
def test_launches_equal_pythons_on_random_layers(programs: Programs, chance: random.Random, tmp_path: Path,
                                                 make: Callable, capability: int, sm_count: int) -> None:
    """Kernels picked, grids, arguments in the file's order, workspace: what reaches the driver is Python's, number by
    number; kernels above 48 KiB of shared memory ask for it."""
    requests, launched, said = [], [], []
    for number in range(60):
        layer, sizes = make(chance)
        carried = set(chance.sample((80, 86, 89, 90, 120, 121), chance.randrange(1, 4)))
        carried |= {capability} if chance.random() < 0.8 else set()
        keys, cubins, container = make_kernels(layer, sizes, tuple(sorted(carried)), chance)
        requests.append(request_of(tmp_path, str(number), keys, container, layer, sizes))
        try:
            picked = {name: cubins[key.sha256] for name, key in choose_kernels.pick(keys, capability).items()}
        except GqaExportError as error:
            said.append(error.what)
            continue
        given = {name: ADDRESSES[name] for name in fields.node_inputs(vars(layer))} | {"output": OUTPUT}
        launched += [expected_launch(one)
                     for one in launch.launches(layer, sizes, picked, given, WORKSPACE, sm_count)]
        said.append(str(launch.workspace_bytes(layer, sizes)))
    log = tmp_path / "log"
    output = programs.run("probe_attention", "enqueue", stdin="\n".join(requests), GQA_STUB_LOG=log,
                          GQA_STUB_CAPABILITY=str(capability), GQA_STUB_SMS=str(sm_count))
    assert output.splitlines() == said
    lines = log.read_text().splitlines()
    assert [logged_launch(line) for line in lines if line.startswith("launch")] == launched
    assert len(launched) > 60
    loaded = [line.split()[2] for line in lines if line.startswith("module loaded")]
    raised = {line.split()[1] for line in lines if line.startswith("attribute") and line.endswith(" 8 70000")}
    assert raised
    assert raised <= set(loaded)
    assert len(loaded) == sum(line.startswith("module unloaded") for line in lines)


def check_all(cubins: Iterable[Cubin], layer: launch.Layer, sizes: launch.Sizes) -> None:
    for cubin in cubins:
        choose_kernels.check_cubin(cubin, layer, sizes)


@pytest.mark.parametrize("change", ["group", "head", "dtype", "window", "sinks", "rotary", "ring"])
def test_kernel_of_another_layer_is_refused_in_the_same_words(programs: Programs, chance: random.Random,
                                                              tmp_path: Path, change: str) -> None:
    layer = launch.Layer(8, 2, 0.125, 0.0, 128, 0, 0, 1, 1, 1)
    sizes = launch.Sizes(1, 1, 256, 64, 64, "fp16", 32, 256)
    other_layer = launch.Layer(6 if change == "group" else 8, 2, 0.125, 0.0, 0 if change == "window" else 128, 0,
                               RING if change == "ring" else 0, 1, 0 if change == "sinks" else 1, 1)
    other = launch.Sizes(1, 1, 256, 32 if change == "head" else 64, 64, "bf16" if change == "dtype" else "fp16",
                         16 if change == "rotary" else 32, 256)
    keys, cubins, container = make_kernels(other_layer, other, (89,), chance)
    by_kernel = {key.kernel: cubins[key.sha256] for key in keys}
    in_order = [by_kernel[kernel] for kernel in ("append", "prefill", "decode", "combine")]  # as C++ loads them
    with pytest.raises(GqaExportError) as caught:
        check_all(in_order, layer, sizes)
    request = request_of(tmp_path, "other", keys, container, layer, sizes)
    assert programs.run("probe_attention", "enqueue", stdin=request) == f"{caught.value.what}\n"


def test_driver_failures_and_missing_kernels_are_said(programs: Programs, chance: random.Random,
                                                              tmp_path: Path) -> None:
    layer, sizes = launch.Layer(4, 2, 0.125, 0.0, 0, 0, 0, 0, 0, 1), launch.Sizes(1, 1, 64, 32, 32, "fp16")
    keys, _, container = make_kernels(layer, sizes, (89,), chance)
    request = request_of(tmp_path, "all", keys, container, layer, sizes)
    refused = programs.run("probe_attention", "enqueue", stdin=request, GQA_STUB_FAIL="cuLaunchKernel")
    assert refused == "launching kernel append failed: CUDA_ERROR_STUB: the stand-in was told to fail\n"
    fewer = request_of(tmp_path, "fewer", [key for key in keys if key.kernel != "prefill"], container, layer, sizes)
    assert programs.run("probe_attention", "enqueue", stdin=fewer) == "the engine names no prefill kernel\n"


def test_sha256_equals_hashlib(programs: Programs, chance: random.Random, tmp_path: Path) -> None:
    """Every length around the block and padding edges, and one of many blocks."""
    contents = [chance.randbytes(size) for size in (*range(0, 131), 1_000_003)]
    paths = [write(tmp_path, str(number), data) for number, data in enumerate(contents)]
    assert [one.strip() for one in answers(programs, "sha256", paths)] == [
        hashlib.sha256(data).hexdigest() for data in contents]


def described(data: bytes) -> str:
    """A kernel file as the C++ program prints it, or its refusal, from Python's reader."""
    try:
        one = Cubin.from_bytes(data)
    except GqaExportError as error:
        return f"error {error}"
    head = (one.kernel, one.name, one.capability, one.shared_bytes, one.threads, one.tile_rows, one.scratch_pointers,
            len(one.code))
    pairs = [*one.arguments, *sorted(one.constants.items())]
    return "\n".join([" ".join(map(str, head)), *(f"{name} {value}" for name, value in pairs)])


def without_reason(text: str) -> str:
    """A refusal whose last words differ by language: which line, as the language names the failure."""
    return text.split("lines are incomplete:")[0]


def test_kernel_files_are_read_and_refused_as_in_python(programs: Programs, chance: random.Random,
                                                        tmp_path: Path) -> None:
    whole = make_cubin(Variant("decode", "bf16", 4, 64, 64, 4), 89, chance).to_bytes()
    files = [whole, b"", b"gqa-cubin 1", b"gqa-cubin 1\n\n", whole[:-1], whole + b"x",
             whole.replace(b"gqa-cubin 1", b"gqa-cubin 2"), whole.replace(b"\n\n", b"\n")]
    files += [whole.replace(line + b"\n", b"", 1) for line in whole.partition(b"\n\n")[0].split(b"\n")[1:]]
    files += [whole.replace(b"threads 128", b"threads many").replace(b"threads 256", b"threads many")]
    head = len(whole.partition(b"\n\n")[0]) + 2
    for place in range(head, len(whole), 7):
        altered = bytearray(whole)
        altered[place] ^= 1 << chance.randrange(8)
        files.append(bytes(altered))
    paths = [write(tmp_path, str(number), data) for number, data in enumerate(files)]
    said = [without_reason(one.strip()) for one in answers(programs, "cubin", paths)]
    assert said == [without_reason(described(data)) for data in files]
    assert sum(one.startswith("error") for one in said) > 15


def test_containers_are_read_and_refused_as_in_python(programs: Programs, chance: random.Random,
                                                      tmp_path: Path) -> None:
    whole = fields.pack([chance.randbytes(size) for size in (0, 10, 1000, 77)])
    head = len(whole.partition(b"\n\n")[0])
    files = [whole, fields.pack([]), b"", fields.MAGIC, whole[:-1], whole + b"\n", whole.replace(b" 77", b" 78"),
             whole.replace(b"cubins 1", b"cubins 2"), whole.replace(b" 10\n", b" ten\n"), whole[: head + 1]]
    for _ in range(100):
        altered = bytearray(whole)
        altered[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        files.append(bytes(altered))

    def said_by_python(data: bytes) -> str:
        try:
            return "\n".join(f"{sha} {len(file)}" for sha, file in sorted(fields.unpack(data).items()))
        except GqaExportError as error:
            return f"error {error}"

    paths = [write(tmp_path, str(number), data) for number, data in enumerate(files)]
    assert [one.strip() for one in answers(programs, "container", paths)] == [said_by_python(data) for data in files]


def test_key_lists_are_read_and_refused_as_in_python(programs: Programs, tmp_path: Path) -> None:
    sha = hashlib.sha256(b"").hexdigest()
    good = fields.keys_text([Key("decode", 89, sha), Key("append", 120, sha)])
    bad = [good[:-1], b"sparse 89 " + sha.encode() + b"\n", b"decode 8.9 " + sha.encode() + b"\n",
           b"decode 89 " + sha[:-1].encode() + b"\n", b"decode 89 " + sha.upper().encode() + b"\n", b"\n"]
    paths = [write(tmp_path, str(number), data) for number, data in enumerate([good, b"", *bad])]
    said = [one.strip() for one in answers(programs, "keys", paths)]
    assert said[:2] == [good.decode().strip(), ""]
    for one, data in zip(said[2:], bad, strict=True):
        with pytest.raises(GqaExportError) as caught:
            fields.parse_keys(data)
        assert one == f"error {caught.value}"
