"""Facts about this machine and this Python: processor, memory, NVIDIA driver, packages. Standard library only.

Nothing here raises because something is missing: that is what it is there to find out.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

IMPORT_TIMEOUT_S = 120
NOT_INSTALLED = "not installed"

# Run in a child process: a package whose native library is broken may end the process that imports it. A line is
# printed before and after each import, so that the culprit is known.
PROBE = """
import importlib, json, sys
for names in json.loads(sys.argv[1]):
    print(json.dumps({"begin": names[0]}), flush=True)
    facts = {}
    for name in names:
        try:
            module = importlib.import_module(name)
        except BaseException as error:
            facts["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        facts = {"error": "", "version": str(getattr(module, "__version__", ""))}
        if name == "onnxruntime":
            facts["providers"] = module.get_available_providers()
        break
    print(json.dumps({"end": names[0], **facts}), flush=True)
"""


@dataclass(frozen=True)
class Imported:
    """What happened when a package was imported. error "" is success."""

    error: str
    version: str = ""
    providers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """One CUDA device, as the driver names it."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """driver: CUDA version that the driver offers ("13.0"), "" without a driver. Memory 0: unknown."""

    python: str
    executable: str
    system: str
    processor: str
    cores: int
    memory_bytes: int
    free_memory_bytes: int
    driver: str
    gpus: tuple[Gpu, ...]


def describe_machine() -> Machine:
    """Look at this machine."""
    total, free = memory()
    driver, gpus = nvidia()
    return Machine(platform.python_version(), sys.executable, f"{platform.system()} {platform.release()}",
                   f"{processor()} ({platform.machine()})", cores(), total, free, driver, gpus)


def processor() -> str:
    """The processor's name, or what the platform calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def memory() -> tuple[int, int]:
    """Bytes of memory: all, and free for a new process. (0, 0) where it is not known."""
    try:
        entries = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        kib = {words[0]: int(words[1]) for words in entries}
        return kib["MemTotal:"] << 10, kib["MemAvailable:"] << 10
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        import psutil

        return psutil.virtual_memory().total, psutil.virtual_memory().available
    except Exception:  # missing or broken: memory stays unknown
        return 0, 0


def nvidia() -> tuple[str, tuple[Gpu, ...]]:
    """The CUDA version of the NVIDIA driver and the devices it shows, asked from the driver itself."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(name)
        number = ctypes.c_int()
        if cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(number)):
            return "", ()
        version = f"{number.value // 1000}.{number.value % 1000 // 10}"
        if cuda.cuDeviceGetCount(ctypes.byref(number)):
            return version, ()
        return version, tuple(_gpu(cuda, index) for index in range(number.value))
    except (OSError, AttributeError):
        return "", ()


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, size = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # ..._MINOR
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", size.value)


def installed_version(distribution: str) -> str:
    """Version of an installed distribution, "" if it is not installed."""
    try:
        return metadata.version(distribution) or ""
    except metadata.PackageNotFoundError:
        return ""


def installed_names(prefix: str) -> list[str]:
    """Names of the installed distributions that begin with `prefix`, lower case with hyphens, sorted."""
    names = {(dist.metadata["Name"] or "").lower().replace("_", "-") for dist in metadata.distributions()}
    return sorted(name for name in names if name.startswith(prefix))


def try_imports(modules: Iterable[tuple[str, ...]]) -> dict[str, Imported]:
    """Import modules in a child process; a tuple lists alternatives, the first that works counts. By first name."""
    pending, found = list(modules), {}
    while pending:
        lines, died = _probe(pending)
        running = ""
        for line in lines:
            if "begin" in line:
                running = line["begin"]
            else:
                running, name = "", line.pop("end")
                found[name] = Imported(line["error"], line.get("version", ""), tuple(line.get("providers", ())))
        if running:
            found[running] = Imported(f"importing it {died}")
        rest = [names for names in pending if names[0] not in found]
        if len(rest) == len(pending):  # the child itself does not run
            found.update((names[0], Imported(f"importing it {died}")) for names in rest)
            rest = []
        pending = rest
    return found


def _probe(modules: list[tuple[str, ...]]) -> tuple[list[dict], str]:
    from .tensorrt_libraries import all_visible

    command = [sys.executable, "-c", PROBE, json.dumps(modules)]
    try:
        with all_visible() as environment:
            child = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False,
                                   stdin=subprocess.DEVNULL,
                                   env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)})
        output, died = child.stdout, f"ended the process with code {child.returncode}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        died = f"took more than {IMPORT_TIMEOUT_S} s"
    except OSError as error:
        output, died = "", f"failed: {error.strerror}"
    return [json.loads(line) for line in output.splitlines() if line.startswith(('{"begin"', '{"end"'))], died
