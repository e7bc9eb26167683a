"""What gqa-export can do here, what is missing and the command that gets it, and which packages clash.

Judges facts that `machine`, `import_probe` and `requirements` gather. Standard library only, so that it works where
nothing else does.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import machine
from .import_probe import Imported, try_imports
from .machine import Machine
from .packages import NOT_INSTALLED, installed_names, installed_version
from .requirements import Package, declared, packages, requirement_of, unmet

OLDEST_PYTHON, FIRST_UNKNOWN_PYTHON = (3, 11), (3, 14)


@dataclass(frozen=True)
class Ability:
    """Something gqa-export does, and what it needs for that: packages, a GPU, a provider of ONNX Runtime."""

    what: str
    needs: tuple[str, ...]
    gpu: bool = False
    provider: str = ""


# The same module from another distribution: which one is installed decides what it can do.
TWINS = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
         "onnxruntime-genai": ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml"),
         "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
         "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings")}

EXPORT = ("click", "rich", "numpy", "torch", "transformers", "accelerate", "safetensors", "huggingface-hub", "onnx",
          "onnx-ir", "onnxscript", "onnx-graphsurgeon", "pydantic", "typing-extensions", "filelock", "platformdirs")
ENGINES = ("onnx", "polygraphy", "triton")
ABILITIES: tuple[Ability, ...] = (
    Ability("export a checkpoint to ONNX", EXPORT),
    Ability("validate a bundle on the CPU", (*EXPORT, "polygraphy", "onnxruntime")),
    Ability("run and bench a bundle on the CPU",
            ("click", "numpy", "transformers", "onnxruntime", "psutil", "pydantic")),
    Ability("read GGUF files", ("gguf",)),
    Ability("chat templates", ("jinja2",)),
    Ability("validate and run on a GPU", (*EXPORT, "polygraphy", "onnxruntime"), True, "CUDAExecutionProvider"),
    Ability("load `ort` bundles in onnxruntime-genai", ("onnxruntime-genai",)),
    Ability("Triton kernels, interpreted on the CPU", ("torch", "triton")),
    Ability("Triton kernels on a GPU", ("torch", "triton"), True),
    Ability("build TensorRT for RTX engines, on any machine", (*ENGINES, "tensorrt-rtx")),
    Ability("run TensorRT for RTX engines", ("cuda-bindings", "tensorrt-rtx", "torch"), True),
    Ability("build and run TensorRT engines", (*ENGINES, "cuda-bindings", "tensorrt", "torch"), True),
)
BASIC = ABILITIES[:2]
DECLARED = declared()
PACKAGES: tuple[Package, ...] = packages(DECLARED, (name for ability in ABILITIES for name in ability.needs))


@dataclass(frozen=True)
class Answer:
    """Whether an ability is there; if not, why, and the command that changes it ("" if no command does)."""

    what: str
    ready: bool
    reason: str = ""
    fix: str = ""


@dataclass(frozen=True)
class PackageState:
    """version "" is not installed; `error` is why it does not work."""

    name: str
    version: str
    error: str


@dataclass(frozen=True)
class Diagnosis:
    """The answer of `gqa-export doctor`."""

    version: str
    machine: Machine
    packages: tuple[PackageState, ...]
    providers: tuple[str, ...]
    abilities: tuple[Answer, ...]
    problems: tuple[Answer, ...]

    @property
    def ready(self) -> bool:
        """Whether the basic job can run here: export, and validate on the CPU."""
        return all(answer.ready for answer in self.abilities[: len(BASIC)]) and supported_python(self.machine.python)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {**asdict(self), "ready": self.ready}


def diagnose() -> Diagnosis:
    """Examine this machine and this Python."""
    imported = try_imports(package.modules for package in PACKAGES)
    states = tuple(package_state(package, imported[package.modules[0]]) for package in PACKAGES)
    here = machine.describe_machine()
    providers = imported["onnxruntime"].providers
    return Diagnosis(installed_version("gqa-export"), here, states, providers, judge_abilities(states, here, providers),
                     find_problems(here, providers, os.environ))


def package_state(package: Package, imported: Imported) -> PackageState:
    """What is known of a package: its version, and why it cannot be used, if it cannot."""
    version = imported.version
    for name in TWINS.get(package.name, (package.name,)):
        version = installed_version(name) or version
    if imported.error and not version:
        return PackageState(package.name, "", NOT_INSTALLED)
    wrong = [] if imported.error else unmet(package.requirement, version)
    return PackageState(package.name, version, imported.error or (f"needs {', '.join(wrong)}" if wrong else ""))


def judge_abilities(states: tuple[PackageState, ...], here: Machine, providers: tuple[str, ...]) -> tuple[Answer, ...]:
    """One answer for each ability."""
    broken = {state.name: state.error for state in states if state.error}
    return tuple(judge_ability(ability, broken, here, providers) for ability in ABILITIES)


def judge_ability(ability: Ability, broken: Mapping[str, str], here: Machine, providers: tuple[str, ...]) -> Answer:
    """Whether an ability is there, given the packages that are missing or broken and why."""
    missing = [name for name in ability.needs if name in broken]
    if missing:
        reason = "; ".join(f"{name}: {broken[name]}" for name in missing)
        return Answer(ability.what, False, reason, install(*requirements_of(missing)))
    if ability.gpu and not here.gpus:
        return Answer(ability.what, False, "no NVIDIA GPU with a driver is visible")
    if ability.provider and ability.provider not in providers:
        fix = f"{uninstall('onnxruntime')} && {install(requirement_of('onnxruntime-gpu', DECLARED))}"
        return Answer(ability.what, False, f"this onnxruntime has no {ability.provider}", fix)
    return Answer(ability.what, True)


def find_problems(here: Machine, providers: tuple[str, ...], environment: Mapping[str, str]) -> tuple[Answer, ...]:
    """Clashes and settings that make sound installations misbehave."""
    problems = []
    if not DECLARED:
        problems.append(Answer("the metadata of gqa-export is missing", False, "no version of a package is checked",
                               install("gqa-export")))
    if not supported_python(here.python):
        problems.append(Answer(f"Python {here.python} is not supported", False, "gqa-export is made for 3.11 to 3.13",
                               "make a virtual environment with one of those"))
    for module in ("onnxruntime", "onnxruntime-genai"):
        rivals = [name for name in installed_names(module) if name in TWINS[module]]
        if len(rivals) > 1:
            keep = next((name for name in rivals if name != module), rivals[0]) if here.gpus else rivals[0]
            problems.append(Answer(
                f"{' and '.join(rivals)} are both installed", False,
                "they write into the same folder; which providers are found is chance",
                f"{uninstall(*rivals)} && {install(keep)}"))
    if environment.get("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "").lower() == "python":
        problems.append(Answer("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python is set", False,
                               "reading and writing ONNX files takes many times as long",
                               "unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"))
    if here.gpus and providers and "CUDAExecutionProvider" not in providers:
        problems.append(Answer("there is a GPU, but this onnxruntime is for the CPU", False,
                               "bundles run on the CPU here",
                               f"{uninstall('onnxruntime')} && {install(requirement_of('onnxruntime-gpu', DECLARED))}"))
    return tuple(problems)


def supported_python(version: str) -> bool:
    """Whether gqa-export is made for this version of Python."""
    return OLDEST_PYTHON <= tuple(int(part) for part in version.split(".")[:2]) < FIRST_UNKNOWN_PYTHON


def requirements_of(names: Sequence[str]) -> list[str]:
    """What to hand to pip for packages of the table."""
    return [text for package in PACKAGES if package.name in names for text in (package.requirement, *package.beside)]


def install(*requirements: str) -> str:
    """The pip command that installs requirements into this Python."""
    return f"{sys.executable} -m pip install {' '.join(map(quoted, requirements))}"


def uninstall(*names: str) -> str:
    """The pip command that removes distributions from this Python."""
    return f"{sys.executable} -m pip uninstall -y {' '.join(names)}"


def quoted(requirement: str) -> str:
    """For the shell: < and > would redirect."""
    return f"'{requirement}'" if re.search(r"[<>\[ ]", requirement) else requirement
