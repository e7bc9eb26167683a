"""Which TensorRT builds, for which GPUs: from the installed libraries, the options and the GPU of this machine.

TensorRT builds for the GPU at hand and needs one. TensorRT for RTX builds ahead of time for a list of compute
capabilities on any machine; the list it knows is its own (`trt.ComputeCapability`, read in version 1.7).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..environment.machine import nvidia
from ..environment.tensorrt_libraries import Library, find, is_there
from ..errors import GqaExportError, NotCheckedHere

RTX_CAPABILITIES = (75, 80, 86, 89, 120, 121)
RTX_DEFAULT = (80, 89, 120)
KERNEL_CAPABILITIES = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
CURRENT = "current"


@dataclass(frozen=True)
class Choice:
    """engine_capabilities: what TensorRT is told, () is the GPU at hand. capabilities: what the engine runs on."""

    library: Library
    engine_capabilities: tuple[int, ...]
    capabilities: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def kernel_capabilities(self) -> tuple[int, ...]:
        """What the plugin's kernels are compiled for."""
        return self.capabilities


def choose(flavor: str, names: tuple[str, ...], *, plugin: bool) -> Choice:
    """Choose the library and the compute capabilities of a build.

    Args:
        flavor: "auto", "tensorrt" or "rtx".
        names: compute capabilities as text, such as "8.9"; "current" is the GPU at hand; () is the flavour's choice.
        plugin: whether the plugin's kernels are needed.

    Raises:
        GqaExportError: the flavour or the plugin does not support a capability, or the flavour is not installed.
        NotCheckedHere: the build needs a GPU, and the machine has none.
    """
    gpus = tuple(_number(gpu.compute_capability, "this machine's GPU") for gpu in nvidia()[1])
    if flavor == "auto":
        flavor = "tensorrt" if gpus and is_there("tensorrt") else "rtx"
    if flavor == "tensorrt" and not gpus:
        raise NotCheckedHere("TensorRT builds on the GPU that the engine is for, and no NVIDIA GPU with a driver is "
                             "visible here", "--flavor tensorrt",
                             "run this on the target machine (docs/gpu.md), or use --flavor rtx", code="E-ENV-GPU")
    library = find(flavor)
    here = gpus[:1]
    engine: tuple[int, ...]
    wanted = _wanted(names, here)
    if flavor == "tensorrt":
        if wanted and wanted != here:
            raise GqaExportError(f"TensorRT builds for the GPU at hand, which has {dotted(here)}",
                                 "--compute-capability", "leave it out, or use --flavor rtx",
                                 code="E-OPTION-CAPABILITY")
        engine, capabilities = (), here
    else:
        capabilities = wanted or RTX_DEFAULT
        unknown = [number for number in capabilities if number not in RTX_CAPABILITIES]
        if unknown and capabilities != here:
            raise GqaExportError(f"TensorRT for RTX does not build for {dotted(unknown)} ahead of time",
                                 "--compute-capability",
                                 f"use {dotted(RTX_CAPABILITIES)}, or `{CURRENT}` on such a GPU",
                                 code="E-OPTION-CAPABILITY")
        engine = () if unknown else capabilities
    if plugin and (missing := [number for number in capabilities if number not in KERNEL_CAPABILITIES]):
        raise GqaExportError(f"the plugin has no kernels for {dotted(missing)}", "--compute-capability",
                             f"use {dotted(KERNEL_CAPABILITIES)}, or --attention native",
                             code="E-OPTION-CAPABILITY")
    return Choice(library, engine, capabilities)


def _wanted(names: tuple[str, ...], here: tuple[int, ...]) -> tuple[int, ...]:
    if CURRENT in names and not here:
        raise NotCheckedHere(f"--compute-capability {CURRENT} is the GPU at hand, and this machine has none",
                             "--compute-capability", "name it: --compute-capability 8.9", code="E-ENV-GPU")
    numbers = [here[0] if text == CURRENT else _number(text, "--compute-capability") for text in names]
    return tuple(sorted(set(numbers)))


def _number(text: str, where: str) -> int:
    major, dot, minor = text.partition(".")
    if not (major.isdigit() and (minor.isdigit() if dot else len(major) > 1)):
        raise GqaExportError(f"{text!r} is not a compute capability", where, "write it as 8.9",
                             code="E-OPTION-CAPABILITY")
    return int(major) * 10 + int(minor) if dot else int(major)


def dotted(numbers: list[int] | tuple[int, ...]) -> str:
    """Capabilities as people write them: 8.9, 12.0."""
    return ", ".join(f"{number // 10}.{number % 10}" for number in numbers)
