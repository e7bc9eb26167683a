"""Facts about this machine, this Python and this process: processor, memory, NVIDIA driver.

Nothing here raises because something is missing: `doctor` must run where only click is installed. Memory comes from
psutil. Two figures psutil does not have, so they are read here: the processor's name (/proc/cpuinfo, Linux) and the
peak of the resident memory (getrusage).
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


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
        import psutil

        found = psutil.virtual_memory()
        return found.total, found.available
    except Exception:  # missing or broken: memory stays unknown
        return 0, 0


def peak_bytes() -> int:
    """The most physical memory this process has occupied so far (file-backed pages included); 0 if unknown."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return getattr(psutil.Process().memory_info(), "peak_wset", 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


LARGE, SMALL = 1 << 20, 1 << 17
"""bytes of the blocks that are given back: by a process that asks for it, and inside `small_blocks_apart`"""
_apart: list[int] = []


def large_blocks_apart() -> None:
    """Let this process give large blocks of memory back when they are freed. glibc otherwise comes to keep blocks of up
    to 32 MB, which small ones cut up: PyTorch's activations then take several times their size. Elsewhere: nothing."""
    _give_back_from(LARGE)
    _apart[:] = [LARGE]


@contextmanager
def small_blocks_apart() -> Iterator[None]:
    """Inside, blocks of an eighth of that size are given back too, where this process gives large ones back."""
    if not _apart:
        yield
        return
    _give_back_from(SMALL)
    try:
        yield
    finally:
        _give_back_from(LARGE)


def _give_back_from(size: int) -> None:
    try:
        ctypes.CDLL(None).mallopt(-3, size)  # M_MMAP_THRESHOLD
    except (AttributeError, OSError, TypeError):
        return


def nvidia() -> tuple[str, tuple[Gpu, ...]]:
    """The CUDA version of the NVIDIA driver and the devices it shows, read from the driver itself."""
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
