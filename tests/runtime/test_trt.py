"""Engine bundles as sessions, over a pretended TensorRT: the tokens are right, the refusals come first."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gqa_models import write_tiny
from gqa_plugins.grouped_attention import tensorrt as plugin
from refusal import refused
from small_text import SENTENCES, byte_tokenizer

from gqa_export.bundle.engine_facts import PluginFacts, ProfileFacts
from gqa_export.bundle.manifest import MANIFEST, read_manifest
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.cli import main
from gqa_export.environment import tensorrt_libraries
from gqa_export.errors import GqaExportError, InvalidBundle, NotCheckedHere
from gqa_export.runtime.generate import generate
from gqa_export.runtime.open_session import open_bundle
from gqa_export.runtime.tensorrt import check
from gqa_export.runtime.tensorrt.check import check_bundle, check_device, import_flavor
from gqa_export.runtime.tensorrt.session import EngineSession
from gqa_export.runtime.torch_session import TorchSession
from gqa_export.validation.reference import _interpreted
from gqa_export.validation.validate import validate

from .conftest import CAPACITY, VOCABULARY
from .engine_stand_in import VERSION, Device, module, pretend_cuda, refacts, write_engine
from .row_schedule import Alone, play

TARGETS = ["trt-plugin", "trt-native"]
TOLERANCE = 1e-4
"""fp32 on logits up to 20, as in the other sessions' tests: a wrong token gives 0.1 and more"""
# (S, new tokens per row): past the window of 16, more than the engine takes at once (8), rows that bring nothing
STEPS = ((19, (19, 5, 1)), (1, (1, 1, 1)), (4, (2, 4, 1)), (1, (1, 0, 1)), (1, (1, 1, 1)), (1, (1, 1, 1)),
         (10, (0, 10, 3)), (1, (1, 1, 1)), (2, (0, 0, 0)), (1, (1, 1, 1)))


@pytest.fixture(scope="session")
def interpreted(bundle, tmp_path_factory):
    """target -> (manifest of its ONNX bundle, folder with the graph as ONNX Runtime runs it)."""
    made: dict[str, tuple] = {}

    def get(target: str):
        if target not in made:
            folder = bundle(target, "static", "last")
            place = tmp_path_factory.mktemp("interpreted") / target
            with _interpreted(folder, read_manifest(folder), []) as (_, graph):
                shutil.copytree(graph, place)
            made[target] = read_manifest(folder), place
        return made[target]

    return get


@pytest.fixture
def engine(interpreted, tmp_path):
    """(target, **facts) -> the folder of an engine bundle that a test may change."""
    def make(target: str = "trt-plugin", **options) -> Path:
        manifest, graph = interpreted(target)
        return write_engine(tmp_path / "engine", graph, manifest, **options)

    return make


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU with a pretended TensorRT: (bundle) -> its session; `.device` is the log."""
    device = Device()
    pretend_cuda(monkeypatch, device)
    monkeypatch.setattr("gqa_export.runtime.tensorrt.device.cuda_device", lambda number: torch.device("cpu"))
    monkeypatch.setattr(plugin, "register", lambda trt: None)
    monkeypatch.setattr(plugin, "failures", [])

    def load(folder: Path, **options) -> EngineSession:
        monkeypatch.setattr("gqa_export.runtime.tensorrt.session.import_flavor",
                            lambda facts, where: module(device, folder))
        return EngineSession.load(folder, **options)

    load.device = device
    return load


def last_rows(logits: np.ndarray, new: tuple[int, ...]) -> np.ndarray:
    """[B, V] of each row's last valid token, zero where there is none."""
    rows = [logits[b, min(count, logits.shape[1]) - 1] * (count > 0) for b, count in enumerate(new)]
    return np.stack(rows)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_of_an_engine_join_leave_and_go_back_as_if_each_were_alone(engine, gpu, target) -> None:
    folder = engine(target, max_batch=4)
    count = play(gpu(folder), Alone(gpu(folder)), 60, seed=8, vocabulary=VOCABULARY, longest=CAPACITY - 4, marks=False)
    assert min(count.values()) > 5


def test_a_row_that_overflowed_leaves_nothing_in_the_cache_of_an_engine_that_would_read_it(engine, gpu) -> None:
    session = gpu(engine("trt-native"))
    session.reset(2)
    session.step(np.full((2, 6), 7))
    for tensor in session.backend.caches:
        tensor[0] = float("nan")
    session.reset_row(0)
    assert np.isfinite(session.step(np.full((2, 2), 7)).logits).all()


def drive(session, steps=STEPS) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    session.reset(len(steps[0][1]))
    shown = []
    for width, new in steps:
        ids = random.integers(0, VOCABULARY, (len(new), width))
        step = session.step(ids, np.array(new), want_cache=True)
        real = np.arange(width)[None] < np.array(new)[:, None]
        shown.append(last_rows(step.logits, new))
        shown += [np.where(real[:, None, :, None], rows, 0) for rows in (*step.keys, *step.values)]
    return shown


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_ragged_batches_in_pieces_over_a_past_equal_pytorch(engine, gpu, model, target, cuda_graph) -> None:
    session = gpu(engine(target), cuda_graph=cuda_graph)
    for got, wanted in zip(drive(session), drive(TorchSession(model, CAPACITY, "fp64")), strict=True):
        np.testing.assert_allclose(got, wanted, atol=TOLERANCE, rtol=0)
    assert bool(gpu.device.replayed) == cuda_graph
    assert set(gpu.device.plain) == {0, 1}  # both profiles were used


def test_rows_that_do_not_begin_at_an_aligned_address_run_in_memory_of_their_own(engine, gpu, model,
                                                                                monkeypatch) -> None:
    """A row that runs by itself is bound where it lies in the cache, which an odd number of its elements misaligns."""
    monkeypatch.setattr("gqa_export.runtime.tensorrt.device.ALIGNMENT", 2**20)  # no row but the first is aligned so
    session, bound = gpu(engine("trt-native", max_batch=2)), gpu.device.bound
    steps = ((CAPACITY - 2, (CAPACITY - 2, 3)), (6, (2, 6)), (3, (0, 3)))
    for got, wanted in zip(drive(session, steps), drive(TorchSession(model, CAPACITY, "fp64"), steps), strict=True):
        np.testing.assert_allclose(got, wanted, atol=TOLERANCE, rtol=0)
    starts = {tensor.data_ptr() for tensor in session.backend.caches}
    ends = {tensor.data_ptr(): tensor.data_ptr() + tensor.nbytes for tensor in session.backend.caches}
    inside = [address for name, address in bound if name.startswith(("past_key_values", "present"))
              and any(start < address < ends[start] for start in starts)]
    assert not inside, "a row was bound inside the cache"
    apart = [address for name, address in bound if name.startswith("past_key_values") and address not in starts]
    assert apart, "some rows ran by themselves"


@pytest.mark.parametrize("target", TARGETS)
def test_generate_gives_pytorchs_tokens_until_the_cache_is_full(engine, gpu, model, target) -> None:
    session = gpu(engine(target))
    prompts = [list(range(3, 24)), [5, 6, 7], list(range(40, 72))]
    found, wanted = (generate(each, prompts, 40) for each in (session, TorchSession(model, CAPACITY, "fp32")))
    assert found.tokens == wanted.tokens
    assert found.finish == wanted.finish
    assert "cache full" in found.finish
    assert session.lengths.max() == CAPACITY


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_an_engine_that_gives_hidden_states_has_memory_for_them_and_returns_pytorchs(
        checkpoint, tmp_path, gpu, model, cuda_graph) -> None:
    """In pieces of 8, ragged, over a past, and replayed. 1e-5: fp32's rounding in two layers."""
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx

    made = export_onnx(checkpoint, tmp_path / "bundle", ExportOptions("trt-plugin", capacity=48, hidden_states=True))
    with _interpreted(made.folder, made.manifest, []) as (_, graph):
        session = gpu(write_engine(tmp_path / "engine", graph, made.manifest), cuda_graph=cuda_graph)
        expected = TorchSession(model, 48, "fp64", hidden=True)
        for each in (session, expected):
            each.reset(3)
        for width, counts in STEPS:
            ids = np.random.default_rng(width).integers(3, 320, (3, width))
            got, right = (each.step(ids, np.array(counts)).hidden for each in (session, expected))
            for b, count in enumerate(counts):
                np.testing.assert_allclose(got[b, :count], right[b, :count], atol=1e-5, rtol=0)


def test_a_decode_step_is_captured_once_a_batch_size_after_one_plain_step(engine, gpu) -> None:
    session = gpu(engine())
    for batch, captured in ((2, 1), (2, 1), (3, 2)):
        session.reset(batch)
        session.step(np.full((batch, 4), 9))
        for _ in range(4):
            session.step(np.full((batch, 1), 9))
        assert gpu.device.captured == captured
    # the second batch of 2 keeps the graph of the first: 3 + 4 + 3 of 12 decode steps
    assert gpu.device.replayed == 10
    assert gpu.device.plain.count(0) == 2


def test_the_cache_stays_where_it_is_and_is_emptied_by_reset(engine, gpu) -> None:
    session = gpu(engine())
    addresses = [tensor.data_ptr() for tensor in session.backend.caches]
    session.step(np.array([[4, 5, 6]]))
    session.step(np.array([[7]]))
    assert [tensor.data_ptr() for tensor in session.backend.caches] == addresses
    assert all(bool(tensor[:, :, :4].any()) for tensor in session.backend.caches)
    session.reset(1)
    assert [tensor.data_ptr() for tensor in session.backend.caches] == addresses
    assert not any(bool(tensor.any()) for tensor in session.backend.caches)
    assert session.lengths.tolist() == [0]


def test_decode_on_the_device_equals_step(engine, gpu) -> None:
    session = gpu(engine())
    shown = []
    for way in ("step", "decode"):
        session.reset(2)
        session.step(np.array([[4, 5, 6], [7, 8, 0]]), np.array([3, 2]))
        if way == "step":
            shown += [session.step(np.array([[9], [10]])).logits for _ in range(3)]
            continue
        ids = torch.tensor([[9], [10]], dtype=torch.int32)
        for before in shown:
            np.testing.assert_array_equal(session.decode(ids).numpy(), before)
    assert session.lengths.tolist() == [6, 5]
    assert session.device_logits.shape == (2, 1, VOCABULARY)


@pytest.mark.parametrize(("action", "code"), [
    (lambda s: s.reset(4), "E-RUN-BATCH"),
    (lambda s: s.reset(0), "E-RUN-BATCH"),
    (lambda s: s.step(np.zeros((1, CAPACITY + 1), np.int64)), "E-RUN-CAPACITY"),
    (lambda s: s.step(np.array([[VOCABULARY]])), "E-RUN-VOCABULARY"),
    (lambda s: s.step(np.zeros((2, 1), np.int64)), "E-RUN-SHAPE"),
    (lambda s: s.decode(torch.zeros((2, 1), dtype=torch.int32)), "E-RUN-SHAPE")])
def test_what_does_not_fit_is_refused_before_anything_runs(engine, gpu, action, code) -> None:
    session = gpu(engine())
    session.step(np.array([[4, 5]]))
    cache, ran = session.cache(), list(gpu.device.plain)
    with refused(code) as refusal:
        action(session)
    assert refusal.error.fix
    assert gpu.device.plain == ran
    assert session.lengths.tolist() == [2]
    for before, after in zip(cache, session.cache()):
        np.testing.assert_array_equal(before, after)


def test_a_full_cache_takes_no_more_on_the_device_either(engine, gpu) -> None:
    session = gpu(engine())
    session.step(np.full((1, CAPACITY), 9))
    with refused("E-RUN-CAPACITY"):
        session.decode(torch.zeros((1, 1), dtype=torch.int32))


def test_padding_never_passes_the_end_of_a_native_cache(engine, gpu, model) -> None:
    steps = ((CAPACITY - 2, (CAPACITY - 2, 3)), (6, (2, 6)), (3, (0, 3)))
    session = gpu(engine("trt-native", max_batch=2))
    for got, wanted in zip(drive(session, steps), drive(TorchSession(model, CAPACITY, "fp64"), steps), strict=True):
        np.testing.assert_allclose(got, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_an_engine_is_validated_like_any_bundle(engine, gpu, checkpoint, target) -> None:
    folder = engine(target)
    gpu(folder)
    verdict = validate(folder, checkpoint, steps=6)
    assert verdict.passed, str(verdict.first)
    assert {"teacher_forced", "free_running", "ragged", "garbage_tail"} <= {case.name for case in verdict.cases}
    assert (verdict.provider, verdict.checked_dtype) == ("rtx", "float32")
    assert not [note for note in verdict.notes if "interpreted" in note]


@pytest.mark.parametrize("option", [{"as_dtype": "fp32"}, {"provider": "cuda"}])
def test_an_engine_is_compared_as_it_was_built(engine, checkpoint, option) -> None:
    with refused("E-OPTION-ENGINE"):
        validate(engine(), checkpoint, **option)


@pytest.mark.parametrize("option", [{"provider": "cpu"}, {"low_memory": True}, {"threads": 2}])
def test_an_engine_knows_nothing_of_onnx_runtimes_options(engine, option) -> None:
    with refused("E-OPTION-ENGINE"):
        open_bundle(engine(), **option)


def wrong_plugin(**changes) -> dict:
    return {"plugin": replace(PluginFacts("GroupedQueryAttention", "1", "gqa", 1, "0" * 64), **changes)}


@pytest.mark.parametrize(("facts", "code", "fact"), [
    ({"flavor": "tensorflow"}, "E-ENGINE-FLAVOR", "'tensorflow'"),
    ({"stripped": True}, "E-ENGINE-STRIPPED", ""),
    ({"aliases": {}}, "E-ENGINE-ALIAS", "present.0.key into the memory of past_key_values.0.key"),
    ({"profiles": ()}, "", "decode profile"),
    ({"profiles": (ProfileFacts("decode", {}),)}, "E-ENGINE-PROFILE", "input_ids"),
    ({"plugin": None}, "E-ENGINE-PLUGIN-MISSING", ""),
    (wrong_plugin(version="4"), "E-ENGINE-PLUGIN", "gqa::GroupedQueryAttention version 1"),
    (wrong_plugin(namespace="other"), "E-ENGINE-PLUGIN", "other::"),
    (wrong_plugin(contract_version=2), "", "version 2"),
    (wrong_plugin(), "E-ENGINE-KERNELS", "")])
def test_a_manifest_that_does_not_fit_is_refused(engine, facts, code, fact) -> None:
    """code "": it is another package's."""
    folder = refacts(engine(), **facts)
    with pytest.raises(GqaExportError, match=fact) as refusal:
        check_bundle(folder)
    assert code in ("", refusal.value.code)
    assert refusal.value.exit_code == 2
    assert refusal.value.fix


def test_a_changed_engine_is_refused_by_its_sha256_before_tensorrt_sees_it(engine, gpu) -> None:
    folder = engine()
    data = bytearray((folder / "model.engine").read_bytes())
    data[-1] ^= 1
    (folder / "model.engine").write_bytes(data)
    with refused("E-BUNDLE-HASH"):
        gpu(folder)
    (folder / "model.engine").unlink()
    with refused("E-BUNDLE-FILE"):
        gpu(folder)


def test_a_manifest_of_another_shape_is_refused(engine) -> None:
    folder = engine()
    data = json.loads((folder / MANIFEST).read_text())
    del data["engine"]["profiles"]
    (folder / MANIFEST).write_text(json.dumps(data))
    with refused("E-BUNDLE-MANIFEST") as refusal:
        check_bundle(folder)
    assert MANIFEST in refusal.error.where


def test_a_bundle_with_a_graph_is_told_how_it_becomes_an_engine(bundle) -> None:
    with refused("E-ENGINE-MISSING", InvalidBundle) as refusal:
        check_bundle(bundle("trt-plugin", "static", "last"))
    assert "gqa-export trt" in refusal.error.fix
    with refused("E-RUN-TARGET") as refusal:
        open_bundle(bundle("trt-plugin", "static", "last"))
    assert "gqa-export trt" in refusal.error.fix


def test_what_was_checked_is_said(engine) -> None:
    lines = "\n".join(check_bundle(engine()).lines)
    assert "TensorRT for RTX 9.9.9, plugin attention, float32, capacity 48, up to 3 sequences" in lines
    assert "compute capability 8.0, 8.9" in lines
    assert "4 outputs in the memory of their inputs" in lines
    assert "2 kernels inside" in lines
    assert "decode: 2 PluginV3" in lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("arguments", [["validate", "--against", "CHECKPOINT"], ["run", "--token-ids", "3,4"],
                                       ["bench", "--prompt-tokens", "2", "--new-tokens", "2"]])
def test_without_a_gpu_nothing_is_run_and_nothing_passes(engine, checkpoint, arguments) -> None:
    verb, *rest = [str(checkpoint) if word == "CHECKPOINT" else word for word in arguments]
    done = CliRunner().invoke(main, [verb, str(engine()), *rest])
    assert done.exit_code == 3, done.output
    assert "this machine cannot run the engine" in done.output
    assert "PASSED" not in done.output
    assert ("checked: plugin: gqa::GroupedQueryAttention version 1, 2 layers" in done.output) == (verb == "validate")


def test_a_gpu_of_another_capability_is_refused(engine, monkeypatch) -> None:
    facts = check_bundle(engine()).facts
    pretend_cuda(monkeypatch, Device(), (9, 0))
    with refused("E-ENGINE-COMPUTE-CAPABILITY", InvalidBundle) as refusal:
        check_device(facts, 0, "there")
    assert "compute capability 8.0, 8.9, this GPU (Stand-in 4090) has 9.0" in refusal.error.what
    assert refusal.error.fix == "build it again with --compute-capability 9.0"
    with refused("E-ENV-DEVICE"):
        check_device(replace(facts, compute_capabilities=()), 1, "there")
    check_device(replace(facts, compute_capabilities=()), 0, "there")


def test_pytorch_is_asked_for_where_it_is_missing(engine, monkeypatch) -> None:
    facts = check_bundle(engine()).facts
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with refused("E-ENV-TORCH", NotCheckedHere):
        check_device(facts, 0, "there")


def library(monkeypatch, here: tuple[str, ...], version: str = VERSION) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(tensorrt_libraries, "is_there", lambda flavor: flavor in here)
    monkeypatch.setattr(tensorrt_libraries, "find",
                        lambda flavor: tensorrt_libraries.Library(flavor, "pretended_tensorrt", version, ()))
    monkeypatch.setitem(__import__("sys").modules, "pretended_tensorrt", SimpleNamespace(__version__=version))


def test_another_flavour_or_version_is_refused_and_the_very_same_is_taken(engine, monkeypatch) -> None:
    facts = check_bundle(engine()).facts
    library(monkeypatch, ("tensorrt",))
    with refused("E-ENV-FLAVOR"):
        import_flavor(facts, "there")
    library(monkeypatch, ("rtx",), "9.9.8")
    with refused("E-ENGINE-VERSION", InvalidBundle):
        import_flavor(facts, "there")
    library(monkeypatch, ("rtx", "tensorrt"))
    assert import_flavor(facts, "there").__version__ == VERSION


def test_without_any_tensorrt_the_package_is_named(engine, monkeypatch) -> None:
    facts = check_bundle(engine()).facts
    monkeypatch.setattr(tensorrt_libraries, "find_spec", lambda name: None)
    with pytest.raises(GqaExportError, match="tensorrt_rtx"):
        import_flavor(facts, "there")


def test_an_engine_that_tensorrt_cannot_open_is_an_error_of_ours(engine, interpreted, gpu, monkeypatch) -> None:
    folder = engine()
    (folder / "model.engine").write_bytes(b"something else")
    monkeypatch.setattr(check, "check_files", lambda *args, **kwargs: [])
    monkeypatch.setattr(check, "_check_kernels", lambda *args: "")
    with refused("E-ENGINE-OPEN") as refusal:
        gpu(folder)
    assert refusal.error.where.endswith("model.engine")


def test_what_the_plugin_refused_comes_out_of_a_run_that_failed(engine, gpu) -> None:
    session = gpu(engine())
    gpu.device.fail = True
    with refused("E-ENGINE-RUN"):
        session.step(np.array([[4, 5]]))
    session.backend._failures.append(GqaExportError("kernel decode is for another GPU", "layer 3", "build it again",
                                                    code="E-ENGINE-OF-THE-PLUGIN"))
    with refused("E-ENGINE-OF-THE-PLUGIN"):
        session.step(np.array([[4, 5]]))
    assert session.lengths.tolist() == [0]


@pytest.fixture(scope="session")
def ringed(checkpoint, tmp_path_factory):
    """(manifest of a bundle whose layers keep rings of 24 slots, folder with its graph as ONNX Runtime runs it)."""
    import gqa_export as gqa

    folder = gqa.export(checkpoint, tmp_path_factory.mktemp("rings") / "bundle", target="trt-plugin",
                        capacity=CAPACITY, window_cache="small", prompt_chunk=8).folder
    place = tmp_path_factory.mktemp("interpreted") / "rings"
    with _interpreted(folder, read_manifest(folder), []) as (_, graph):
        shutil.copytree(graph, place)
    return read_manifest(folder), place


def test_an_engine_over_rings_says_what_the_model_says(ringed, gpu, model, tmp_path) -> None:
    manifest, graph = ringed
    session, truth = gpu(write_engine(tmp_path / "engine", graph, manifest)), TorchSession(model, CAPACITY)
    assert {tensor.shape[2] for tensor in session.backend.caches} == {24}
    for garbage in ((), (1e4, float("nan"))):
        session.fill_garbage(garbage)
        random = np.random.default_rng(12)
        session.reset(3)
        truth.reset(3)
        for width, new in ((30, (30, 7, 1)), *STEPS[1:6]):
            ids = random.integers(0, VOCABULARY, (3, width))
            step, expected = (each.step(ids, np.array(new), want_cache=True) for each in (session, truth))
            np.testing.assert_allclose(step.logits[:, 0], last_rows(expected.logits, new), atol=TOLERANCE)
            for mine, theirs in zip((*step.keys, *step.values), (*expected.keys, *expected.values), strict=True):
                np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)
    session.fill_garbage(())
    key, expected = session.cache()[0][0], truth.cache()[0][0]
    for b, length in enumerate(session.lengths.tolist()):  # what garbage may lie behind every later window is not kept
        kept = slice(max(0, length - 15), length)
        np.testing.assert_allclose(key[b, :, kept], expected[b, :, kept], atol=TOLERANCE)


@pytest.fixture(scope="session")
def coded(tmp_path_factory):
    """codes -> (manifest of a bundle whose cache holds them, its graph's folder as ONNX Runtime runs it, the model)."""
    import gqa_export as gqa

    made: dict[str, tuple] = {}
    checkpoint = write_tiny("llama", tmp_path_factory.mktemp("coded") / "checkpoint", num_hidden_layers=2)
    byte_tokenizer(checkpoint)
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(SENTENCES))

    def get(codes: str) -> tuple:
        if codes not in made:
            folder = gqa.export(checkpoint, tmp_path_factory.mktemp("codes") / "bundle", target="trt-plugin",
                                capacity=CAPACITY, kv_cache=codes, calibrate=text).folder
            place = tmp_path_factory.mktemp("interpreted") / codes
            with _interpreted(folder, read_manifest(folder), []) as (_, graph):
                shutil.copytree(graph, place)
            made[codes] = read_manifest(folder), place, load_model(open_checkpoint(checkpoint), "float32")
        return made[codes]

    return get


@pytest.mark.parametrize("codes", ["int8"])  # ONNX Runtime, which stands in for TensorRT here, has no graph of fp8
def test_an_engine_over_codes_keeps_them_in_bytes_and_says_what_the_model_says(coded, gpu, tmp_path, codes) -> None:
    """PyTorch rounds every key and value to the same codes. Garbage is the largest code and the least."""
    manifest, graph, model = coded(codes)
    session = gpu(write_engine(tmp_path / "engine", graph, manifest))
    truth = TorchSession(model, CAPACITY, spec=manifest.spec, kv=manifest.kv_cache)
    for garbage in ((), (1e4, -1e4)):
        session.fill_garbage(garbage)
        random = np.random.default_rng(12)
        session.reset(3)
        truth.reset(3)
        for width, new in ((30, (30, 7, 1)), *STEPS[1:4]):
            ids = random.integers(0, manifest.spec.vocabulary, (3, width))
            step, expected = (each.step(ids, np.array(new), want_cache=True) for each in (session, truth))
            np.testing.assert_allclose(step.logits[:, 0], last_rows(expected.logits, new), atol=TOLERANCE)
            for mine, theirs in zip((*step.keys, *step.values), (*expected.keys, *expected.values), strict=True):
                np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)
    assert {tensor.element_size() for tensor in session.backend.caches} == {1}


def test_rows_of_an_engine_over_rings_are_as_if_each_were_alone(ringed, gpu, tmp_path) -> None:
    manifest, graph = ringed
    folder = write_engine(tmp_path / "engine", graph, manifest, max_batch=4)
    session = gpu(folder)
    count = play(session, Alone(gpu(folder)), 60, seed=8, vocabulary=VOCABULARY, longest=CAPACITY - 4, marks=False,
                 rings=True)
    assert min(count.values()) > 5
    session.reset(1)
    session.step(np.full((1, 40), 7))
    with refused("E-RUN-ROW-WINDOW"):
        session.rewind_row(0, 30)


def test_an_engine_that_takes_more_at_once_than_its_rings_hold_is_refused(ringed, gpu, tmp_path) -> None:
    manifest, graph = ringed
    with refused("E-ENGINE-PROFILE", InvalidBundle):
        gpu(write_engine(tmp_path / "engine", graph, manifest, max_prompt=9))
