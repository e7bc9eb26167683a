"""The model repository for Triton Inference Server, and the model in it, run beside a stand-in for the server."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from refusal import refused

from gqa_export.bundle.engine_facts import EngineFacts
from gqa_export.bundle.manifest import Manifest
from gqa_export.bundle.writer import writing_bundle
from gqa_export.integrations import triton_backend
from gqa_export.integrations.triton_repository import check_repository, write_repository
from gqa_export.spec import ModelSpec

SPEC = ModelSpec("llama", "LlamaForCausalLM", 16, 8, 64, "default", ())
MANIFEST = Manifest("trt-plugin", "float16", "static", 64, "last", "copy", SPEC, (), (), tokens={"eos": [7]})
FACTS = EngineFacts("rtx", "1.7", (89,), "plugin", (), {})


class CountingSession:
    """Says t + 1 after t."""

    spec, capacity = SPEC, 12

    def reset(self, batch: int) -> None:
        self._lengths = np.zeros(batch, np.int64)

    @property
    def lengths(self) -> np.ndarray:
        return self._lengths.copy()

    def step(self, ids, new=None, *, want_cache=False):
        self._lengths += new
        return SimpleNamespace(logits=np.eye(16)[[(row[count - 1] + 1) % 16 for row, count in zip(ids, new)]][:, None])


class Sender:
    """Keeps what is sent, and whether it was the last."""

    def __init__(self) -> None:
        self.sent: list = []

    def send(self, response=None, flags: int = 0) -> None:
        self.sent.append((response, flags))


@pytest.fixture
def triton(monkeypatch) -> ModuleType:
    made = ModuleType("triton_python_backend_utils")
    made.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    made.Tensor = lambda name, array: SimpleNamespace(name=name, as_numpy=lambda: array)
    made.TritonError = lambda text: SimpleNamespace(text=text)
    made.InferenceResponse = lambda output_tensors=(), error=None: SimpleNamespace(tensors=output_tensors, error=error)
    made.get_input_tensor_by_name = lambda request, name: request.tensors.get(name)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


@pytest.fixture
def bundle(tmp_path) -> Path:
    with writing_bundle(tmp_path / "small-llama") as writer:
        writer.write("model.engine", b"not an engine")
        writer.finish(replace(MANIFEST, engine=FACTS))
    return tmp_path / "small-llama"


@pytest.fixture
def model(bundle, triton, tmp_path, monkeypatch):
    """The TritonPythonModel that the server finds in model.py."""
    loaded: list[Path] = []
    monkeypatch.setattr(triton_backend, "load_session", lambda folder: loaded.append(folder) or CountingSession())
    folder = write_repository(tmp_path / "repository", bundle)
    spec = importlib.util.spec_from_file_location("served_model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    served = module.TritonPythonModel()
    served.initialize({"model_repository": str(folder), "model_version": "1"})
    assert loaded == [folder / "1" / "engine"]
    return served


def ask(model, triton, **tensors) -> list:
    sender = Sender()
    given = {name: triton.Tensor(name, np.array(value)) for name, value in tensors.items()}
    model.execute([SimpleNamespace(tensors=given, get_response_sender=lambda: sender)])
    assert [flags for _, flags in sender.sent] == [0] * (len(sender.sent) - 1) + [1]
    return [response for response, _ in sender.sent]


def tokens(responses: list) -> list[int]:
    return [int(one.tensors[0].as_numpy()[0]) for one in responses if one is not None]


def test_the_repository_is_laid_out_as_the_server_expects(bundle, tmp_path) -> None:
    folder = write_repository(tmp_path / "repository", bundle)
    assert folder == tmp_path / "repository" / "small-llama"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "config.pbtxt", "1/model.py", "1/engine/model.engine", "1/engine/gqa_export.json"}
    config = (folder / "config.pbtxt").read_text()
    assert config.count("{") == config.count("}")
    assert config.count("[") == config.count("]")
    for text in ('name: "small-llama"', 'backend: "python"', "decoupled: true", 'name: "input_ids"', 'name: "token"'):
        assert text in config
    assert (folder / "1" / "engine" / "model.engine").samefile(bundle / "model.engine"), "no second copy of the weights"
    assert write_repository(tmp_path / "repository", bundle) == folder, "its own it may replace"


def test_tokens_are_streamed_until_an_end_token(model, triton) -> None:
    assert tokens(ask(model, triton, input_ids=[2, 3])) == [4, 5, 6, 7]
    assert tokens(ask(model, triton, input_ids=[[9]], max_new_tokens=[2])) == [10, 11]


def test_a_bad_request_is_answered_with_the_error_and_the_next_is_served(model, triton) -> None:
    for wrong in ({"input_ids": []}, {}, {"input_ids": [1] * 13}, {"input_ids": [1], "temperature": [-1.0]}):
        (answer,) = ask(model, triton, **wrong)
        assert "fix:" in answer.error.text
    assert tokens(ask(model, triton, input_ids=[5])) == [6, 7]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error 700"), MemoryError(), TypeError("x"), SystemExit(1),
                                   KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_every_request_is_answered_whatever_is_raised(model, triton, error, monkeypatch) -> None:
    real, calls = model.session.reset, []

    def reset(batch: int) -> None:
        calls.append(batch)
        if len(calls) == 1:
            raise error
        real(batch)

    monkeypatch.setattr(model.session, "reset", reset)
    senders = [Sender(), Sender()]
    requests = [SimpleNamespace(tensors={"input_ids": triton.Tensor("input_ids", np.array([5]))},
                                get_response_sender=lambda sender=sender: sender) for sender in senders]
    if isinstance(error, Exception):
        model.execute(requests)
    else:
        with pytest.raises(type(error)):
            model.execute(requests)
    (first,), second = senders[0].sent, senders[1].sent
    assert first[1] == 1
    assert type(error).__name__ in first[0].error.text
    assert [flags for _, flags in second] == [0, 0, 1]
    assert tokens([response for response, _ in second]) == [6, 7]


def test_a_client_that_has_gone_stops_no_other(model, triton) -> None:
    class Gone(Sender):
        def send(self, response=None, flags: int = 0) -> None:
            raise RuntimeError("the sender is closed")

    senders = [Gone(), Sender()]
    model.execute([SimpleNamespace(tensors={"input_ids": triton.Tensor("input_ids", np.array([5]))},
                                   get_response_sender=lambda sender=sender: sender) for sender in senders])
    assert tokens([response for response, _ in senders[1].sent]) == [6, 7]


def test_a_model_is_replaced_at_once_and_an_interrupted_one_leaves_the_old(bundle, tmp_path, monkeypatch) -> None:
    repository = tmp_path / "repository"
    folder = write_repository(repository, bundle)
    removed = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: removed.append(Path(path).resolve()))
    write_repository(repository, bundle)
    assert folder.resolve() not in removed, "the model was gone for a moment"
    monkeypatch.undo()
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gqa_export.integrations.triton_repository.config", stop)
    with pytest.raises(KeyboardInterrupt):
        write_repository(repository, bundle)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    assert [path.name for path in repository.iterdir() if not path.name.startswith(".")] == [folder.name]


def test_a_place_that_is_taken_and_a_name_that_cannot_be_are_refused(bundle, tmp_path) -> None:
    (tmp_path / "repository" / "small-llama").mkdir(parents=True)
    with refused("E-FILE-TRITON-MODEL"):
        check_repository(tmp_path / "repository", "small-llama")
    with refused("E-OPTION-TRITON-NAME"):
        check_repository(tmp_path, "small llama")


def test_only_an_engine_can_be_served(tmp_path) -> None:
    with writing_bundle(tmp_path / "graph") as writer:
        writer.finish(MANIFEST)
    with refused("E-OPTION-TRITON-ENGINE"):
        write_repository(tmp_path / "repository", tmp_path / "graph")
