"""No input of a user ends in "this is a bug": every command refuses it with its cause, and nothing hangs."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_text import byte_tokenizer

from gqa_export.cli import explain, main
from gqa_export.errors import EXIT_BUG

NOT_OBJECTS = ["[]", "3", "null", "NaN", '"x"', "", "{", "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "\udcff"]


@pytest.fixture(scope="module")
def spoken(checkpoint, bundle, tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoint, bundle) with a tokenizer."""
    folder = tmp_path_factory.mktemp("spoken")
    found = []
    for place in (checkpoint, bundle):
        found.append(Path(shutil.copytree(place, folder / place.name)))
        byte_tokenizer(found[-1])
    return found[0], found[1]


@pytest.fixture
def ours(spoken, tmp_path) -> tuple[Path, Path]:
    """A copy, to be damaged."""
    return (Path(shutil.copytree(spoken[0], tmp_path / "checkpoint")),
            Path(shutil.copytree(spoken[1], tmp_path / "bundle")))


def run(*arguments: object, allowed: tuple[int, ...] = (2, 3)) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code != EXIT_BUG, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code in allowed, (done.exit_code, done.output)
    return done.output


@pytest.mark.parametrize("options", [
    ("--prompt", "\ud800"), ("--prompt", "a\udcffb"), ("--prompt", ""), ("--prompt", "x" * 500),
    ("--prompt", "x", "--chat", "--system", "\udfff"), ("--token-ids", "9" * 30), ("--token-ids", "9" * 5000),
    ("--token-ids", "-1"), ("--token-ids", "1 x"), ("--token-ids", ""), ("--token-ids", "4294967296"),
    ("--token-ids", "1", "--max-new-tokens", "0"), ("--token-ids", "1", "--max-new-tokens", "-" + "9" * 30),
    ("--token-ids", "1", "--seed", "-1"), ("--token-ids", "1", "--seed", "-5", "--temperature", "1"),
    ("--token-ids", "1", "--threads", "-3"), ("--token-ids", "1", "--threads", "9" * 20),
    ("--token-ids", "1", "--threads", "100000"), ("--token-ids", "1", "--temperature", "nan"),
    ("--token-ids", "1", "--top-p", "nan"), ("--token-ids", "1", "--top-k", "-" + "9" * 30),
], ids=lambda options: " ".join(options)[:40].encode("ascii", "replace").decode())
def test_an_option_of_run_that_makes_no_sense_is_refused(spoken, options):
    run("run", spoken[1], *options)


@pytest.mark.parametrize("options", [
    ("--max-new-tokens", "9" * 30), ("--seed", "9" * 30, "--temperature", "1", "--max-new-tokens", "1"),
    ("--temperature", "1e-320", "--max-new-tokens", "2"), ("--temperature", "1e308", "--max-new-tokens", "2"),
    ("--temperature", "1", "--top-k", "9" * 30, "--max-new-tokens", "2")], ids=" ".join)
def test_a_number_of_any_size_that_makes_sense_is_taken(spoken, options):
    run("run", spoken[1], "--token-ids", "1", *options, allowed=(0,))


@pytest.mark.parametrize("text", NOT_OBJECTS, ids=range(len(NOT_OBJECTS)))
def test_a_configuration_that_is_not_a_json_object_is_refused(ours, text):
    (ours[0] / "config.json").write_text(text, errors="surrogateescape")
    for command in (("onnx", ours[0], "--dry-run"), ("inspect", ours[0]), ("validate", ours[1], "--against", ours[0])):
        assert "code: E-CKPT-JSON" in run(*command)


@pytest.mark.parametrize("text", NOT_OBJECTS, ids=range(len(NOT_OBJECTS)))
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_file_beside_the_weights_that_is_not_a_json_object_is_refused_before_the_work(ours, name, text):
    (ours[0] / name).write_text(text, errors="surrogateescape")
    run("onnx", ours[0], "--dry-run", "--capacity", 64)


@pytest.mark.parametrize("field", ["eos_token_id", "bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", ["x", 1.5, {}, True, [1, "x"], [[1]], 10**30, [None]], ids=str)
def test_a_generation_setting_of_another_type_is_refused_before_the_work(ours, field, value):
    (ours[0] / "generation_config.json").write_text(json.dumps({field: value}))
    assert "code: E-CKPT-TOKEN-ID" in run("onnx", ours[0], "--dry-run", "--capacity", 64)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def broken_link(path: Path) -> None:
    path.symlink_to(path.with_name("not there"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("made", [fifo, folder, link_to_itself, broken_link])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_something_else_than_a_file_is_refused_and_not_waited_for(ours, made, name):
    (ours[0] / name).unlink()
    made(ours[0] / name)
    run("onnx", ours[0], "--dry-run", "--capacity", 64)
    run("inspect", ours[0])


def header(content: dict | str, length: int | None = None, data: int = 16) -> bytes:
    text = (content if isinstance(content, str) else json.dumps(content)).encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HEADERS: list[bytes] = [
    b"", b"\0" * 7, header({}, 2**63), header({"a": 3}), header({"a": {**TENSOR, "dtype": "F33"}}),
    header({"a": {**TENSOR, "dtype": ["F32"]}}), header({"a": {**TENSOR, "shape": [-4]}}),
    header({"a": {**TENSOR, "shape": [2**62, 2**62]}}), header({"a": {**TENSOR, "shape": 4}}),
    header({"a": {**TENSOR, "data_offsets": [16, 0]}}), header({"a": {**TENSOR, "data_offsets": [0, 2**63]}}),
    header({"a": {**TENSOR, "data_offsets": "x"}}), header({"a": TENSOR, "b": TENSOR}), header("[" * 100_000),
    header("{"), header('{"a": NaN}'), header("\udcff"), header('{"a": 1, "a": 2}'), header({"__metadata__": 3}),
]


@pytest.mark.parametrize("data", HEADERS, ids=range(len(HEADERS)))
def test_a_damaged_header_of_weights_is_refused(ours, data):
    (ours[0] / "model.safetensors").write_bytes(data)
    run("onnx", ours[0], "--dry-run", "--capacity", 64)
    run("inspect", ours[0])


@pytest.mark.parametrize("place", ["x" * 5000, "/dev/null", "~nosuchuser/x", "", ".", "/proc/self/mem", "a\nb",
                                   "a\udcffb"],
                         ids=lambda place: repr(place)[:20])
def test_a_path_of_any_kind_is_refused(spoken, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    run("inspect", place)
    run("run", place, "--prompt", "x")
    run("onnx", place, "-o", "out")
    run("validate", spoken[1], "--against", place)


@pytest.mark.parametrize("place", ["x" * 300, "/proc/x", "/dev/null", "taken/x", "taken"])
def test_an_output_that_cannot_be_written_is_refused(spoken, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    run("onnx", spoken[0], "-o", place, "--capacity", 64, "--no-validate")


@pytest.mark.parametrize("template", [
    3, [3], [{"name": "default"}], [{"name": 3, "template": "x"}], {}, {"default": 3}, "{% for %}", "{{ 1/0 }}",
    "{{ x.y.z }}",
    "{{ messages[99].content }}", "{{ messages[0] + 3 }}", "{{ strftime_now(3) }}", "{% include 'x' %}",
    "{{ messages[0].content.__class__.__mro__ }}", "{{ 'x' * 3 + 4 }}", "{{ raise_exception('no') }}",
], ids=str)
def test_a_damaged_chat_template_is_refused(ours, template):
    (ours[1] / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert "code: E-RUN-CHAT" in run("run", ours[1], "--prompt", "x", "--chat", "--max-new-tokens", 1)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", NOT_OBJECTS, ids=range(len(NOT_OBJECTS)))
def test_a_file_of_the_tokenizer_that_is_not_a_json_object_is_refused(ours, name, text):
    (ours[1] / name).write_text(text, errors="surrogateescape")
    assert "code: E-BUNDLE-JSON" in run("run", ours[1], "--prompt", "x", "--chat", "--max-new-tokens", 1)


def program(*arguments: object, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gqa_export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=120, **more)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8", "utf-16"])
def test_a_console_of_any_encoding_shows_the_answer(spoken, encoding):
    """What it cannot show is replaced; the answer is not lost."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = program("run", spoken[1], "--prompt", "x", "--max-new-tokens", 20, env=environment)
    assert done.returncode == 0, done.stderr
    done = program("inspect", "ein\udce4 日本", env=environment)
    assert done.returncode == 2, done.stderr


def test_a_home_and_a_working_directory_that_are_gone_are_no_bug(spoken, tmp_path):
    place = tmp_path / "gone"
    place.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    code = ("import os, sys; os.rmdir(os.getcwd()); sys.argv = ['gqa-export', *sys.argv[1:]]\n"
            "from gqa_export.cli import entry; entry()")
    for arguments in (("onnx", "ck", "-o", "out"), ("inspect", spoken[0]), ("inspect", "x")):
        place.mkdir(exist_ok=True)
        done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, cwd=place,
                              env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])}, timeout=120)
        assert done.returncode in (0, 2), done.stderr


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_output_is_no_bug(closed):
    code = (f"import os, sys; os.close({1 if closed == 'stdout' else 2}); sys.{closed} = None\n"
            "sys.argv = ['g', 'models']; from gqa_export.cli import entry; entry()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_full_disk_behind_the_output_is_told_by_the_exit_code():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "gqa_export", "models"], stdout=full, stderr=subprocess.PIPE,
                              timeout=120)
    assert done.returncode == 2
    assert b"bug" not in done.stderr


@pytest.mark.parametrize("error", [
    OSError(36, "File name too long", "x"), PermissionError(13, "Permission denied", b"x"),
    FileNotFoundError(2, "gone"), IsADirectoryError(21, "Is a directory", 3), OSError(40, "Too many levels", "x"),
    OSError(5, "Input/output error"),
    UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed")], ids=repr)
def test_what_the_system_refuses_is_no_bug(error):
    code, message = explain(error)
    assert code == 2
    assert "bug" not in message


@pytest.mark.parametrize("error", [OSError("no number"), ValueError("x"), RuntimeError("x"),
                                   UnicodeEncodeError("ascii", "ä", 0, 1, "ordinal not in range")], ids=repr)
def test_another_exception_is_still_one(error):
    assert explain(error)[0] == EXIT_BUG


