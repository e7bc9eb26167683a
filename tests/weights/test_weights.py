"""Weights by recipe: where each tensor's bytes are, and graphs that ONNX Runtime runs from wherever they are put."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import gqa_models
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from refusal import refused
from safetensors.torch import load_file, save_file

from gqa_export.bundle.writer import writing_bundle
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.safetensors_header import StoredTensor, header_sha256
from gqa_export.errors import InvalidCheckpoint
from gqa_export.quantized.facts import Form
from gqa_export.quantized.matrix import QuantizedMatrix, Stripe
from gqa_export.quantized.packing import Packer
from gqa_export.weights import slices, source_kinds
from gqa_export.weights.layout import _part_of, place
from gqa_export.weights.slices import CHUNK_BYTES
from gqa_export.weights.source_kinds import MemorySource, PackedSource, SliceSource, StoredSource
from gqa_export.weights.sources import WeightStore
from gqa_export.weights.streams import Stream

ATTENTION = "model.layers.0.self_attn."
QKV = "weights:" + "+".join(f"{ATTENTION}{letter}_proj.weight" for letter in "qkv")
DATA = "model.onnx.data"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return gqa_models.write_tiny("llama_tied", tmp_path_factory.mktemp("llama") / "ck")


@pytest.fixture(scope="module")
def opened(llama):
    checkpoint = open_checkpoint(llama)
    return checkpoint, WeightStore.from_module(checkpoint, load_model(checkpoint))


def initializer(recipe, dims, data_type=TensorProto.FLOAT, name=None):
    tensor = TensorProto(name=name or recipe.removeprefix("weights:"), data_type=data_type, dims=dims,
                         data_location=TensorProto.EXTERNAL)
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", recipe
    return tensor


def matmuls(*tensors, transpose=True):
    """x [1, in] times every initializer [out, in] (or [in, out]), one output each."""
    width = tensors[0].dims[1 if transpose else 0]
    nodes, outputs = [], []
    for number, tensor in enumerate(tensors):
        factor = tensor.name
        if transpose:
            factor = f"t{number}"
            nodes.append(helper.make_node("Transpose", [tensor.name], [factor], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["x", factor], [f"y{number}"]))
        outputs.append(helper.make_tensor_value_info(f"y{number}", tensor.data_type, [1, None]))
    inputs = [helper.make_tensor_value_info("x", tensors[0].data_type, [1, width])]
    graph = helper.make_graph(nodes, "products", inputs, outputs, list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def export(model, store, output, mode, checkpoint=None, **kwargs):
    """Place the weights and write the graph; the Placement and the writer's facts of the files."""
    with writing_bundle(output, inplace=mode == "inplace") as writer:
        placement = place(model, store, writer, mode, checkpoint and checkpoint.folder, **kwargs)
        writer.write("model.onnx", model.SerializeToString())
        (writer.staging / "gqa_export.json").write_text("{}")
    return placement, writer.files


def run(output, x):
    import onnxruntime

    return onnxruntime.InferenceSession(output / "model.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})


def places(model):
    return [{entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer]


def test_stored_and_tied_parameters_are_found_in_the_file(opened):
    checkpoint, store = opened
    assert set(checkpoint.tensors) | {"lm_head.weight"} == set(store.sources)
    assert all(isinstance(source, StoredSource) for source in store.sources.values())
    assert store.sources["lm_head.weight"] is store.sources["model.embed_tokens.weight"]


def test_a_module_in_another_dtype_is_still_the_stored_one(llama):
    checkpoint = open_checkpoint(llama)
    for dtype in ("fp16", "bf16", "fp64"):
        store = WeightStore.from_module(checkpoint, load_model(checkpoint, dtype))
        assert all(isinstance(source, StoredSource) for source in store.sources.values())


@pytest.mark.parametrize("index", [0, -1, 64 * 128 // 2, 64 * 128 // 4, 64 * 128 * 3 // 4])
def test_a_value_changed_after_loading_makes_the_tensor_one_in_memory(llama, index):
    checkpoint = open_checkpoint(llama)
    model = load_model(checkpoint)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.reshape(-1)[index] += 1
    store = WeightStore.from_module(checkpoint, model)
    memory = [name for name, source in store.sources.items() if isinstance(source, MemorySource)]
    assert memory == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("index", [None, CHUNK_BYTES // 2 - 1, CHUNK_BYTES // 2 + 7, 2 * CHUNK_BYTES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tensor_of_many_chunks_is_compared_to_its_last_element(tmp_path, index, dtype):
    """The stored type is bf16: more than four chunks, no whole number of them; the change is between any samples."""
    values = torch.full((2 * CHUNK_BYTES + 1, 1), 0.5, dtype=torch.bfloat16)
    save_file({"weight": values}, tmp_path / "w.safetensors")
    start = (tmp_path / "w.safetensors").stat().st_size - 2 * values.numel()
    stored = StoredTensor(tmp_path / "w.safetensors", start, 2 * values.numel(), "bfloat16", tuple(values.shape))
    module = torch.nn.Linear(1, len(values), bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(values)
        if index is not None:
            module.weight[index] = 0.25
    store = WeightStore.from_module(SimpleNamespace(tensors={"weight": stored}), module)
    assert isinstance(store.sources["weight"], StoredSource if index is None else MemorySource)


def test_merged_experts_are_in_memory_and_untraced_layers_are_stored(tmp_path):
    checkpoint = open_checkpoint(gqa_models.write_tiny("mixtral", tmp_path))
    store = WeightStore.from_module(checkpoint, load_model(checkpoint, num_hidden_layers=1))
    assert isinstance(store.sources["model.layers.0.mlp.experts.gate_up_proj"], MemorySource)
    assert isinstance(store.sources["model.layers.1.self_attn.q_proj.weight"], StoredSource)
    assert "model.layers.1.mlp.experts.gate_up_proj" not in store


@pytest.mark.parametrize("mode", ["copy", "link", "inplace"])
def test_onnx_runtime_runs_the_graph_from_every_placement(llama, tmp_path, mode):
    folder = shutil.copytree(llama, tmp_path / "ck")
    checkpoint = open_checkpoint(folder)
    store = WeightStore.from_module(checkpoint, load_model(checkpoint))
    tensors = load_file(folder / "model.safetensors")
    names = [f"{ATTENTION}o_proj.weight", f"{ATTENTION}v_proj.weight", "lm_head.weight", "model.embed_tokens.weight"]
    model = matmuls(initializer(QKV, [128, 64], name="packed"), *(
        initializer(f"weights:{name}", [{"o": 64, "v": 32}.get(name.split(".")[-2][0], 320), 64]) for name in names))
    output = folder if mode == "inplace" else tmp_path / "out"
    before = (folder / "model.safetensors").stat()
    placement, files = export(model, store, output, mode, checkpoint)
    x = np.random.normal(size=(1, 64)).astype(np.float32)
    packed = torch.cat([tensors[f"{ATTENTION}{letter}_proj.weight"] for letter in "qkv"])
    reference = [packed, *(tensors[name.replace("lm_head", "model.embed_tokens")] for name in names)]
    for got, weight in zip(run(output, x), reference, strict=True):
        np.testing.assert_allclose(got, x @ weight.numpy().T, atol=1e-5)  # fp32, 64 terms of size one
    qkv, matrices, tied = 128 * 64 * 4, (64 + 32) * 64 * 4, 320 * 64 * 4
    if mode == "copy":  # v_proj alone is a range of the packed rows
        assert (placement.bytes_copied, placement.bytes_linked) == (qkv + matrices - 32 * 64 * 4 + tied, 0)
        assert placement.files == (DATA,)
    else:  # q, k, v lie in the file in the order k, o, q, v: packed rows cannot be linked
        assert (placement.bytes_copied, placement.bytes_linked) == (qkv, matrices + tied)
        assert placement.files == ("model.safetensors", DATA)
        after = (folder / "model.safetensors").stat()
        assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        fact = files["model.safetensors"]
        assert (fact.size, fact.mtime_ns, fact.sha256) == (after.st_size, after.st_mtime_ns, "")
        assert fact.header_sha256 == header_sha256(folder / "model.safetensors")
    assert files[DATA].sha256 == hashlib.sha256((output / DATA).read_bytes()).hexdigest()
    if mode == "link":
        assert os.path.samefile(output / "model.safetensors", folder / "model.safetensors")


def test_a_copy_is_aligned_and_each_recipe_is_written_once(opened, tmp_path):
    _, store = opened
    norm = "weights:model.norm.weight"
    model = matmuls(initializer("weights:lm_head.weight", [320, 64]))
    model.graph.initializer.extend([initializer(norm, [64]), initializer(norm, [64], name="again"),
                                    initializer(norm, [64], TensorProto.FLOAT16, "half"),
                                    initializer("weights:model.embed_tokens.weight", [320, 64])])
    placement, files = export(model, store, tmp_path / "out", "copy")
    head, one, again, half, embedding = places(model)
    assert head == embedding
    assert one == again != half
    assert all(int(where["offset"]) % 64 == 0 and where["location"] == DATA for where in places(model))
    assert placement.bytes_copied == 320 * 64 * 4 + 64 * 4 + 64 * 2
    assert files[DATA].size >= placement.bytes_copied


def test_inline_initializers_are_left_alone(opened, tmp_path):
    _, store = opened
    model = matmuls(helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0]))
    placement, files = export(model, store, tmp_path / "out", "link")
    assert (placement.bytes_copied, placement.bytes_linked, placement.files) == (0, 0, ())
    assert set(files) == {"model.onnx"}
    assert run(tmp_path / "out", np.ones((1, 2), np.float32))[0].tolist() == [[3.0, 7.0]]


def test_adjacent_rows_are_linked_as_one_tensor(opened, tmp_path):
    checkpoint, store = opened
    mlp = "model.layers.0.mlp."
    model = matmuls(initializer(f"weights:{mlp}gate_proj.weight+{mlp}up_proj.weight", [256, 64]))
    placement, _ = export(model, store, tmp_path / "out", "link", checkpoint)
    assert (placement.bytes_copied, placement.bytes_linked) == (0, 256 * 64 * 4)
    tensors = load_file(checkpoint.folder / "model.safetensors")
    x = np.random.normal(size=(1, 64)).astype(np.float32)
    reference = torch.cat([tensors[f"{mlp}gate_proj.weight"], tensors[f"{mlp}up_proj.weight"]]).numpy()
    np.testing.assert_allclose(run(tmp_path / "out", x)[0], x @ reference.T, atol=1e-5)


def test_a_hub_snapshot_is_linked_through_its_symbolic_links_but_not_used_in_place(llama, tmp_path):
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in llama.iterdir():
        shutil.copy(file, tmp_path / "blobs" / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    checkpoint = open_checkpoint(snapshot)
    store = WeightStore.from_module(checkpoint, load_model(checkpoint))
    weight = initializer("weights:lm_head.weight", [320, 64])
    export(matmuls(weight), store, tmp_path / "out", "link", checkpoint)
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert run(tmp_path / "out", np.ones((1, 64), np.float32))[0].shape == (1, 320)
    with refused("E-WEIGHTS-LINK-OUTSIDE") as refusal:
        export(matmuls(initializer("weights:lm_head.weight", [320, 64])), store, snapshot, "inplace", checkpoint)
    assert "--weights" in refusal.error.fix
    assert {path.name for path in snapshot.iterdir()} == {path.name for path in llama.iterdir()}


def test_another_file_system_is_an_error_that_says_copy(opened, tmp_path, monkeypatch):
    checkpoint, store = opened

    def refuse(source, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr("gqa_export.weights.layout.os.link", refuse)
    with refused("E-FILE-HARD-LINK") as refusal:
        export(matmuls(initializer("weights:lm_head.weight", [320, 64])), store, tmp_path / "out", "link", checkpoint)
    assert "--weights copy" in refusal.error.fix
    assert not (tmp_path / "out").exists()


def test_two_shards_of_one_name_cannot_both_be_linked(tmp_path):
    tensors = {}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file({folder: torch.ones(2, 2)}, tmp_path / folder / "model.safetensors")
        path = tmp_path / folder / "model.safetensors"
        tensors[folder] = StoredSource(StoredTensor(path, path.stat().st_size - 16, 16, "float32", (2, 2)))
    model = matmuls(initializer("weights:a", [2, 2]), initializer("weights:b", [2, 2]))
    with refused("E-WEIGHTS-NAME-CLASH"):
        export(model, WeightStore(tensors), tmp_path / "out", "link")


def test_hash_full_hashes_linked_files_too(opened, tmp_path):
    checkpoint, store = opened
    _, files = export(matmuls(initializer("weights:lm_head.weight", [320, 64])), store, tmp_path / "out", "link",
                      checkpoint, hash_full=True)
    whole = hashlib.sha256((checkpoint.folder / "model.safetensors").read_bytes()).hexdigest()
    assert files["model.safetensors"].sha256 == whole


TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


@pytest.mark.parametrize("mode", ["copy", "link"])
@pytest.mark.parametrize("source", list(TYPES))
@pytest.mark.parametrize("target", list(TYPES))
def test_conversion_is_what_torch_does_bit_for_bit_and_is_streamed(tmp_path, source, target, mode):
    values = torch.cat([torch.randn(5000), torch.tensor([0.0, -0.0, 1e-8, -3e-6, 6e4, float("inf"), float("nan")])])
    tensor = values.to(getattr(torch, source)).reshape(1, -1)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    offset = (tmp_path / "model.safetensors").stat().st_size - tensor.nbytes
    stored = StoredTensor(tmp_path / "model.safetensors", offset, tensor.nbytes, source, tuple(tensor.shape))
    sources = {"stored": StoredSource(stored), "memory": MemorySource(lambda: tensor, source, tuple(tensor.shape))}
    model = matmuls(*(initializer(f"weights:{name}", tensor.shape, TYPES[target]) for name in sources))
    placement, _ = export(model, WeightStore(sources), tmp_path / "out", mode)
    expected = tensor.to(getattr(torch, target)).view(torch.uint8).numpy().tobytes()
    linked = mode == "link" and source == target
    assert placement.bytes_copied == len(expected) * (1 if linked else 2)
    for where in places(model):
        data = (tmp_path / "out" / where["location"]).read_bytes()
        got = data[int(where["offset"]) :][: int(where["length"])]
        if source == target:
            assert got == expected
        else:  # the bits of a NaN may differ
            ours, theirs = (torch.frombuffer(bytearray(x), dtype=getattr(torch, target)) for x in (got, expected))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("value", "target"), [(65520.0, "float16"), (-1e30, "float16"), (3.4e38, "bfloat16")])
def test_an_overflow_is_an_error_that_names_the_tensor_and_the_value(tmp_path, value, target):
    tensor = torch.zeros(3, 4)
    tensor[2, 1] = value
    store = WeightStore({"some.weight": MemorySource(lambda: tensor, "float32", (3, 4))})
    with refused("E-WEIGHTS-OVERFLOW") as refusal:
        export(matmuls(initializer("weights:some.weight", [3, 4], TYPES[target])), store, tmp_path / "out", "copy")
    assert refusal.error.where == "some.weight"
    assert f"{abs(np.float32(value)):.6g}" in refusal.error.what
    assert not (tmp_path / "out").exists()


def test_the_largest_half_does_not_overflow_and_integers_are_never_converted(tmp_path):
    tensor = torch.tensor([[65519.0, -65504.0]])
    store = WeightStore({"w": MemorySource(lambda: tensor, "float32", (1, 2)),
                         "n": MemorySource(lambda: np.array([[7, 8]]), "int64", (1, 2))})
    export(matmuls(initializer("weights:w", [1, 2], TensorProto.FLOAT16)), store, tmp_path / "half", "copy")
    assert np.frombuffer((tmp_path / "half" / DATA).read_bytes(), np.float16).tolist() == [65504.0, -65504.0]
    export(matmuls(initializer("weights:n", [1, 2], TensorProto.INT64)), store, tmp_path / "whole", "copy")
    assert np.frombuffer((tmp_path / "whole" / DATA).read_bytes(), np.int64).tolist() == [7, 8]
    with refused("E-WEIGHTS-CONVERT") as refusal:
        export(matmuls(initializer("weights:n", [1, 2])), store, tmp_path / "out", "copy")
    assert refusal.error.where == "n"


@pytest.mark.parametrize(
    ("recipe", "dims", "code", "shown"),
    [
        ("weights:absent", [2, 2], "E-WEIGHTS-UNKNOWN", "'absent'"),
        ("weights:lm_head.weight", [64, 320], "E-WEIGHTS-SHAPE", "(64, 320), the checkpoint as [(320, 64)]"),
        ("weights:lm_head.weight", [320, 32], "E-WEIGHTS-SHAPE", "(320, 32)"),
        (QKV, [64, 64], "E-WEIGHTS-SHAPE", "(64, 64)"),
        (f"weights:{ATTENTION}q_proj.weight+model.layers.0.mlp.down_proj.weight", [128, 64], "E-WEIGHTS-SHAPE",
         "(128, 64)"),
    ],
)
def test_a_graph_that_disagrees_with_the_checkpoint_is_refused(opened, tmp_path, recipe, dims, code, shown):
    checkpoint, store = opened
    with refused(code, InvalidCheckpoint) as refusal:
        export(matmuls(initializer(recipe, dims)), store, tmp_path / "out", "copy", checkpoint)
    assert shown in refusal.error.what


def test_aliases_and_added_sources_are_found(tmp_path):
    tensor = torch.randn(3, 4)
    store = WeightStore({"w": MemorySource(lambda: tensor, "float32", (3, 4))}, aliases={"tied": "w"})
    store.add("half", MemorySource(lambda: tensor.numpy() / 2, "float32", (3, 4)))
    names = ("w", "tied", "half")
    assert all(name in store for name in names)
    export(matmuls(*(initializer(f"weights:{name}", [3, 4]) for name in names)), store, tmp_path / "out", "copy")
    w, tied, half = run(tmp_path / "out", np.ones((1, 4), np.float32))
    np.testing.assert_array_equal(w, tied)
    np.testing.assert_allclose(half * 2, w, rtol=1e-6)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(100))
    store = WeightStore({"w": StoredSource(StoredTensor(path, 40, 64, "float32", (4, 4)))})
    with refused("E-WEIGHTS-FILE-CHANGED", InvalidCheckpoint):
        export(matmuls(initializer("weights:w", [4, 4])), store, tmp_path / "out", "copy")


class Slow(io.FileIO):
    """A file that gives at most five bytes at a time, as FUSE and network file systems may."""

    def readinto(self, buffer):
        return super().readinto(memoryview(buffer)[:5])


def test_a_file_system_that_gives_less_than_it_is_asked_for_is_asked_again(tmp_path, monkeypatch):
    path, random = tmp_path / "model.safetensors", np.random.default_rng(3)
    values = random.random((7, 6), np.float32)
    path.write_bytes(bytes(40) + values.tobytes())
    stored = StoredSource(StoredTensor(path, 40, values.nbytes, "float32", values.shape))
    for module in (source_kinds, slices):
        monkeypatch.setattr(module, "open", lambda path, *_, **__: Slow(path), raising=False)
    assert b"".join(bytes(chunk) for chunk in stored.chunks()) == values.tobytes()
    some = SliceSource(stored, 1, ((0, 2), (3, 6)))
    assert b"".join(bytes(chunk) for chunk in some.chunks()) == values[:, [0, 1, 3, 4, 5]].tobytes()
    os.truncate(path, path.stat().st_size - 1)
    for source in (stored, some):
        with refused("E-WEIGHTS-FILE-CHANGED", InvalidCheckpoint):
            list(source.chunks())


def test_a_part_of_joined_codes_of_four_bits_lies_where_its_bytes_are():
    packers = []
    for rows in (3, 5):  # 9 and 15 bytes
        whole = Stripe(np.zeros((rows, 6), np.int8), np.ones((rows, 1), np.float32))
        packers.append(Packer(QuantizedMatrix((rows, 6), 4, 6, "int", "none", "test", lambda a, b, whole=whole: whole),
                              Form("DequantizeLinear", 4, 6, signed=True)))
    sources = tuple(PackedSource(packer, "codes") for packer in packers)
    stream = Stream("weights:a+b", sources, "int4", [])
    assert stream.nbytes == 24
    assert _part_of(sources[1:], "int4", [stream]) == (stream, 9, 15)
    assert _part_of(sources[:1], "int4", [stream]) == (stream, 0, 9)


@pytest.mark.parametrize("target", ["float32", "float16"])
def test_memory_stays_constant_and_progress_is_told_for_a_large_file(tmp_path, target):
    """128 MiB in two tensors: at most a few chunks are held at once, converting included."""
    half = 64 << 20
    path = Path(tmp_path / "model.safetensors")
    random = np.random.default_rng(1)
    with open(path, "wb") as file:
        for _ in range(2 * half // (1 << 20)):
            file.write(random.standard_normal(1 << 18, dtype=np.float32).tobytes())
    store = WeightStore({name: StoredSource(StoredTensor(path, start, half, "float32", (1024, half // 4096)))
                         for name, start in (("a", 0), ("b", half))})  # fmt: skip
    told: list[tuple[int, int]] = []
    model = matmuls(*(initializer(f"weights:{name}", [1024, half // 4096], TYPES[target]) for name in "ab"))
    place(onnx.ModelProto(), store, None, "copy")  # imports happen before memory is counted
    tracemalloc.start()
    try:
        placement, _ = export(model, store, tmp_path / "out", "copy", on_bytes=lambda *now: told.append(now))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * CHUNK_BYTES
    total = 2 * half // (1 if target == "float32" else 2)
    assert placement.bytes_copied == total == (tmp_path / "out" / DATA).stat().st_size
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    if target == "float32":
        with open(path, "rb") as theirs, open(tmp_path / "out" / DATA, "rb") as ours:
            assert hashlib.file_digest(ours, "sha256").digest() == hashlib.file_digest(theirs, "sha256").digest()


def test_ranges_of_a_tensor_that_comes_in_parts_are_those_of_the_whole():
    from gqa_export.weights.slices import Pieces, made_pieces

    whole = np.arange(48, dtype=np.float32).reshape(6, 8)
    for value in (whole, iter([whole[:2], torch.from_numpy(whole[2:])])):
        found = b"".join(bytes(chunk) for chunk in made_pieces(value, Pieces(6, 32, ((8, 8), (20, 4)))))
        assert found == np.concatenate([whole[:, 2:4], whole[:, 5:6]], axis=1).tobytes()
