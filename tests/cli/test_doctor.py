"""`gqa-export doctor`: right about what is there, helpful about what is not, and never broken by what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

import gqa_export
from gqa_export.cli import main
from gqa_export.environment import doctor, import_probe, requirements
from gqa_export.environment.doctor import ABILITIES, BASIC, PACKAGES, PackageState
from gqa_export.environment.import_probe import Imported
from gqa_export.environment.machine import Gpu, Machine

ROOT = Path(gqa_export.__file__).parent.parent
HERE = Machine("3.11.7", "python", "Linux", "some processor", 2, 8 << 30, 4 << 30, "", ())
WITH_GPU = replace(HERE, driver="13.0", gpus=(Gpu("Some GPU", "9.0", 80 << 30),))
CPU = ("CPUExecutionProvider",)

# Only click and the standard library can be imported, as after `pip install --no-deps gqa-export click`.
BARE = """
import sys
import importlib.abc

class OnlyClick(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names and top not in ("click", "gqa_export", "colorama"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, OnlyClick())
from gqa_export.environment import doctor, import_probe
import_probe.PROBE = open(sys.argv[1]).read() + import_probe.PROBE
doctor.installed_version = lambda name: ""
from gqa_export.cli import main
main.main(["doctor", *sys.argv[2:]])
"""


def states(**errors: str) -> tuple[PackageState, ...]:
    """Every package installed and well, except those named (with - written as _)."""
    return tuple(PackageState(p.name, "" if errors.get(p.name.replace("-", "_")) else "99",
                              errors.get(p.name.replace("-", "_"), "")) for p in PACKAGES)


def answers(packages=None, here=HERE, providers=CPU) -> dict[str, doctor.Answer]:
    return {a.what: a for a in doctor.judge_abilities(packages or states(), here, providers)}


def test_doctor_says_that_this_environment_can_do_the_basic_job() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["ready"] is True
    assert data["version"] == gqa_export.__version__
    versions = {package["name"]: package["version"] for package in data["packages"]}
    import onnx
    import torch

    assert (versions["torch"], versions["onnx"]) == (torch.__version__, onnx.__version__)
    assert "CPUExecutionProvider" in data["providers"]
    assert data["machine"]["cores"] >= 1


def test_doctor_works_where_only_click_is_installed(tmp_path) -> None:
    blocker = tmp_path / "blocker.py"
    blocker.write_text(BARE.split("sys.meta_path.insert(0, OnlyClick())")[0] + "sys.meta_path.insert(0, OnlyClick())\n")
    done = subprocess.run([sys.executable, "-c", BARE, str(blocker)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"torch +- +not installed", done.stdout)
    assert re.search(r"no +export a checkpoint to ONNX: .*torch: not installed", done.stdout)
    assert re.search(r"fix: .*python\S* -m pip install .*'torch>=2.9'", done.stdout)


def test_packages_and_minimum_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [text.split(";")[0].strip() for text in
                [*project["dependencies"], *extras["ort"], *extras["plugins"], *extras["trt"], *extras["rtx"],
                 *(text for text in extras["test"] if "genai" in text)]]
    known = [text for package in PACKAGES for text in (package.requirement, *package.beside)]
    assert {str(Requirement(text)) for text in known} == {str(Requirement(text)) for text in declared}, (
        "the installed metadata is older than pyproject.toml: pip install --no-deps -e .")
    assert len(known) == len(declared)
    assert project["requires-python"] == ">={}.{},<{}.{}".format(*doctor.OLDEST_PYTHON, *doctor.FIRST_UNKNOWN_PYTHON)


def test_a_requirement_that_is_added_shows_up_and_one_of_another_extra_does_not(monkeypatch) -> None:
    from importlib import metadata

    monkeypatch.setattr(metadata, "requires", lambda name: [
        "torch>=2.9", "New_Package>=3,<4", 'fast>=1; extra == "ort"', 'linter>=1; extra == "dev"',
        'genai>=2; extra == "test"', "triton>=3; platform_system == 'Linux' and extra == 'plugins'"])
    table = requirements.packages(requirements.declared(), ["torch", "genai", "onnx"])
    assert {package.name: package.requirement for package in table} == {
        "torch": "torch>=2.9", "genai": "genai>=2", "onnx": "onnx", "new-package": "New_Package>=3,<4",
        "fast": "fast>=1", "triton": "triton>=3"}
    assert next(p.modules for p in table if p.name == "new-package") == ("new_package",)


def test_without_metadata_every_ability_still_has_its_packages_and_the_cause_is_named(monkeypatch) -> None:
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert requirements.declared() == []
    assert [p.requirement for p in requirements.packages([], ["torch"])] == ["torch"]
    monkeypatch.setattr(doctor, "DECLARED", [])
    assert "metadata of gqa-export is missing" in doctor.find_problems(HERE, CPU, {})[0].what


def test_without_packaging_no_version_is_judged(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert requirements.unmet("torch>=2.9", "2.8") == []


def test_every_ability_needs_packages_of_the_table() -> None:
    names = {package.name for package in PACKAGES}
    assert {name for ability in ABILITIES for name in ability.needs} <= names


def test_everything_can_run_where_everything_is_there() -> None:
    found = answers(here=WITH_GPU, providers=("CUDAExecutionProvider", *CPU))
    assert all(answer.ready for answer in found.values()), found


def test_without_onnxruntime_exporting_works_and_validating_names_the_command() -> None:
    found = answers(states(onnxruntime="not installed"), providers=())
    assert found["export a checkpoint to ONNX"].ready
    validating = found["validate a bundle on the CPU"]
    assert not validating.ready
    wanted = next(package.requirement for package in PACKAGES if package.name == "onnxruntime")
    assert validating.fix == f"{sys.executable} -m pip install '{wanted}'"


def test_without_a_gpu_the_gpu_abilities_are_not_offered() -> None:
    for ability in (a for a in ABILITIES if a.gpu):
        answer = answers(providers=("CUDAExecutionProvider", *CPU))[ability.what]
        assert (answer.ready, answer.reason) == (False, "no NVIDIA GPU with a driver is visible")


def test_a_gpu_beside_a_cpu_build_of_onnxruntime_is_a_problem_with_a_fix() -> None:
    problems = doctor.find_problems(WITH_GPU, CPU, {})
    assert [problem.what for problem in problems] == ["there is a GPU, but this onnxruntime is for the CPU"]
    assert "onnxruntime-gpu" in problems[0].fix


def test_onnxruntime_beside_onnxruntime_gpu_is_a_clash(monkeypatch) -> None:
    installed = ["onnxruntime", "onnxruntime-genai", "onnxruntime-gpu"]
    monkeypatch.setattr(doctor, "installed_names", lambda prefix: [n for n in installed if n.startswith(prefix)])
    on_gpu = doctor.find_problems(WITH_GPU, ("CUDAExecutionProvider", *CPU), {})
    assert [problem.what for problem in on_gpu] == ["onnxruntime and onnxruntime-gpu are both installed"]
    assert on_gpu[0].fix.endswith("pip uninstall -y onnxruntime onnxruntime-gpu && "
                                  f"{sys.executable} -m pip install onnxruntime-gpu")
    assert doctor.find_problems(HERE, CPU, {})[0].fix.endswith("-m pip install onnxruntime")


def test_a_slow_protobuf_is_a_problem() -> None:
    problems = doctor.find_problems(HERE, CPU, {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"})
    assert [problem.fix for problem in problems] == ["unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"]


@pytest.mark.parametrize(("version", "fine"), [
    ("3.10.14", False), ("3.11.0", True), ("3.13.9", True), ("3.14.0", False)])
def test_pythons_that_are_supported(version: str, fine: bool) -> None:
    assert doctor.supported_python(version) is fine
    assert bool(doctor.find_problems(replace(HERE, python=version), CPU, {})) is not fine


@pytest.mark.parametrize(("requirement", "version", "wrong"), [
    ("torch>=2.9", "2.13.0+cpu", []), ("torch>=2.9", "2.8.1", [">=2.9"]), ("transformers>=5.20,<6", "6.0", ["<6"]),
    ("transformers>=5.20,<6", "5.20.0", []), ("numpy>=2", "1.26.4", [">=2"]), ("x>=1", "", []),
    ("x>=1.5", "1.5rc1", [">=1.5"]), ("x==1.7.1.116", "1.7.1.116", []), ("x>=1", "no version", [])])
def test_versions_are_compared_as_numbers(requirement: str, version: str, wrong: list[str]) -> None:
    assert requirements.unmet(requirement, version) == wrong


def test_an_old_package_makes_the_ability_unready() -> None:
    package = next(p for p in PACKAGES if p.name == "gguf")
    state = doctor.package_state(replace(package, requirement="gguf>=1000"), Imported("", "0.19.0"))
    assert state.error == "needs >=1000"


def test_a_package_that_ends_the_process_is_named_and_the_others_are_still_examined(tmp_path, monkeypatch) -> None:
    (tmp_path / "gqa_test_kills.py").write_text("import os; os._exit(7)\n")
    (tmp_path / "gqa_test_raises.py").write_text("raise OSError('libsomething.so: cannot open')\n")
    (tmp_path / "gqa_test_works.py").write_text("__version__ = '1.5'\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = import_probe.try_imports([("gqa_test_kills",), ("gqa_test_raises",),
                                      ("gqa_test_missing", "gqa_test_works")])
    assert found["gqa_test_kills"].error == "importing it ended the process with code 7"
    assert found["gqa_test_raises"].error == "OSError: libsomething.so: cannot open"
    assert found["gqa_test_missing"] == Imported("", "1.5")


@pytest.mark.parametrize("first", ["", None], ids=["empty", "python -m"])
def test_a_file_of_the_working_directory_is_not_taken_for_a_package(tmp_path, monkeypatch, first) -> None:
    (tmp_path / "triton.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close(); __version__ = '9.9'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path) if first is None else first, *sys.path])
    found = import_probe.try_imports([("triton",), ("click",)])
    assert found["triton"].version != "9.9"
    assert not (tmp_path / "executed").exists()
    assert found["click"].error == "", "what is installed is still found"


def test_not_ready_without_the_basic_abilities() -> None:
    packages = states(torch="not installed")
    found = doctor.Diagnosis("0", HERE, packages, CPU, doctor.judge_abilities(packages, HERE, CPU), ())
    assert not found.ready
    assert [a.ready for a in found.abilities[: len(BASIC)]] == [False, False]


def test_options_are_documented() -> None:
    from gqa_export.cli.doctor import command

    assert all(option.help for option in command.params if isinstance(option, click.Option))
