"""What needs TensorRT's headers: bundles opened and run through a stand-in for TensorRT 11 (stub_nvinfer.cpp), and the
program gqa_generate. Skipped without the headers."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from .conftest import Programs
from .toy_bundle import answer, continued, engine_facts, write_bundle


@pytest.fixture(scope="module")
def tensorrt(tensorrt_programs: Programs) -> Programs:
    if not (tensorrt_programs.libraries / "libnvinfer.so.11").exists():
        pytest.skip("the stand-in for TensorRT is for the headers of TensorRT 11")
    return tensorrt_programs


def play(programs: Programs, folder: Path, *lines: str, plugin: Path | None = None, expect: int = 0,
         **environment: str | Path) -> list[str]:
    return programs.run("session_on_bundle", folder, *([plugin] if plugin else []), stdin="\n".join(lines) + "\n",
                        expect=expect, GQA_STUB_TENSORRT_VERSION=environment.pop("version", "11.1.0"),
                        **environment).splitlines()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bundle_is_opened_and_run_through_tensorrts_own_classes(tensorrt: Programs, tmp_path: Path,
                                                                dtype: str) -> None:
    """Profiles chosen, shapes set and within them, every tensor bound, presents in the memory of the pasts (the
    stand-in refuses a run otherwise), decode captured and replayed, everything closed in order."""
    folder, log = write_bundle(tmp_path / "bundle", dtype=dtype), tmp_path / "log"
    said = play(tensorrt, folder, "prefill 3,1,4;1,5", "step 9,2", "step 6,5", "step 3,-1", "lengths",
                GQA_STUB_LOG=log)
    assert said == [f"{answer([3, 1, 4])} {answer([1, 5])}", f"{answer([3, 1, 4, 9])} {answer([1, 5, 2])}",
                    f"{answer([3, 1, 4, 9, 6])} {answer([1, 5, 2, 5])}", f"{answer([3, 1, 4, 9, 6, 3])} 0", "6 4"]
    lines = [line for line in log.read_text().splitlines() if line not in ("freed",) and "allocated" not in line]
    assert lines == ["profile 0", "profile 1", "run profile 1", "run profile 0", "capture begins", "capture ends",
                     "graph launched", "run profile 0", "graph launched", "run profile 0", "graph destroyed",
                     "engine closed", "runtime closed", "context released"]


def test_plugin_library_is_loaded_before_the_engine_is_opened(tensorrt: Programs, tmp_path: Path) -> None:
    folder, log = write_bundle(tmp_path / "bundle", plugin=True), tmp_path / "log"
    said = play(tensorrt, folder, "prefill 3", plugin=tensorrt.plugin_library, GQA_STUB_LOG=log)
    assert said == [str(answer([3]))]
    assert log.read_text().splitlines()[0] == f"plugin library {tensorrt.plugin_library}"


@pytest.mark.parametrize(("changes", "environment", "what"), [
    ({"flavor": "rtx"}, {}, "the engine was built by TensorRT-RTX, this program runs with TensorRT"),
    ({}, {"version": "11.0.0"}, "the engine was built by TensorRT 11.1.0.106, this machine has 11.0.0"),
    ({}, {"GQA_STUB_CAPABILITY": "90"}, "this GPU has compute capability 9.0, the engine was built for 8.0, 8.9"),
    ({}, {"GQA_STUB_REFUSE": "deserialize"}, "cannot open the engine: the engine is damaged"),
    ({}, {"GQA_STUB_REFUSE": "context"}, "cannot make an execution context: no memory for a context"),
    ({}, {"GQA_STUB_NO_GPU": "1"}, "the CUDA driver does not start (error 100)"),
])
def test_bundle_that_does_not_fit_is_refused_with_the_fix(tensorrt: Programs, tmp_path: Path, changes: dict,
                                                          environment: dict, what: str) -> None:
    folder = write_bundle(tmp_path / "bundle", facts=replace(engine_facts(), **changes))
    (line,) = play(tensorrt, folder, "prefill 3", expect=2, **environment)
    kind, said, where, fix = line.split("|")
    assert (kind, said) == ("error", what)
    assert where
    assert fix


def test_run_that_fails_is_an_error_and_leaves_the_rows_as_they_were(tensorrt: Programs, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    said = play(tensorrt, folder, "prefill 3,1", "lengths", GQA_STUB_REFUSE="enqueue")
    assert said == ["error|running the engine failed: enqueue was told to fail|TensorRT|build the engine again with "
                    "`gqa-export trt`", "0"]


def test_tensorrt_that_is_not_installed_is_said_with_the_fix(tensorrt: Programs, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    (line,) = play(tensorrt, folder, expect=2, LD_LIBRARY_PATH=tmp_path)
    kind, said, _, fix = line.split("|")
    assert kind == "error"
    assert said.startswith("cannot load libnvinfer.so.11: ")
    assert fix == "install TensorRT 11 and have its lib folder on LD_LIBRARY_PATH"


def test_engine_with_other_tensors_than_its_manifest_is_refused(tensorrt: Programs, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    path = folder / "gqa_export.json"
    data = json.loads(path.read_text())
    data["outputs"] = [one for one in data["outputs"] if one["name"] != "present.1.value"]
    path.write_text(json.dumps(data))
    (line,) = play(tensorrt, folder, expect=2)
    assert line.startswith("error|the engine's inputs and outputs are not those of the manifest|")


def generate(programs: Programs, *arguments: str | Path, expect: int = 0) -> str:
    done = subprocess.run([str(programs.folder / "bin" / "gqa_generate"), *map(str, arguments)], text=True,
                          capture_output=True, env={**os.environ, "LD_LIBRARY_PATH": str(programs.libraries),
                                                    "GQA_STUB_TENSORRT_VERSION": "11.1.0"})
    assert done.returncode == expect, done.stderr
    return done.stdout if expect == 0 else done.stderr


def test_program_prints_new_tokens_a_line_per_prompt(tensorrt: Programs, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", plugin=True)
    output = generate(tensorrt, folder, "--plugin", tensorrt.plugin_library, "--tokens", "3 1 4", "--tokens", "5",
                      "--max-new-tokens", "6", "--end", "2", "--end", "16")
    rows = [continued(prompt, 6, (2, 16)) for prompt in ([3, 1, 4], [5])]
    assert [list(map(int, line.split())) for line in output.splitlines()] == rows
    assert generate(tensorrt, folder, "--plugin", tensorrt.plugin_library, "--tokens", "3 1 4", "--no-cuda-graph",
                    "--max-new-tokens", "3") == "".join(f"{token} " for token in continued([3, 1, 4], 3)) + "\n"


@pytest.mark.parametrize(("arguments", "what"), [
    ([], "no engine bundle is named"), (["b"], "there is no prompt"), (["b", "--tokens"], "--tokens lacks its value"),
    (["b", "--tokens", "1 x"], "--tokens takes whole numbers, not 'x'"), (["b", "--what"], "'--what' is not"),
    (["/nowhere", "--tokens", "1"], "the folder has no gqa_export.json"),
])
def test_program_refuses_in_three_lines_with_exit_code_2(tensorrt: Programs, arguments: list[str], what: str) -> None:
    lines = generate(tensorrt, *arguments, expect=2).splitlines()
    assert lines[0].startswith(f"error: {what}")
    assert lines[1].startswith("  at:  ")
    assert lines[2].startswith("  fix: ")
