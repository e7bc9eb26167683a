"""What every test relies on: no network, one thread a process, the same random numbers each time."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers with two threads each on two cores only wait
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# To look through all memory of a worker at every session that opens costs more than to open a tiny model's; what the
# pages do is tests/runtime/test_huge_pages.py's, and README.md is run with them.
os.environ.setdefault("GQA_EXPORT_HUGE_PAGES", "off")

if "GQA_EXPORT_TRACE_CACHE" not in os.environ:  # set once by the first process; workers and commands inherit it
    os.environ["GQA_EXPORT_TRACE_CACHE"] = tempfile.mkdtemp(prefix="gqa-traces-")
    atexit.register(shutil.rmtree, os.environ["GQA_EXPORT_TRACE_CACHE"], ignore_errors=True)

import numpy as np
import pytest
from quick_polygraphy import quicken

SEED = 20260101
LONGEST = (
    "evidence/test_architecture_slice.py", "exporting/test_export.py", "test_docs.py",
    "hostile/test_manifest_fields.py", "test_scale.py", "systems/test_other_systems.py",
    "exporting/test_shared_caches.py", "engine/test_rtx_plugin.py", "validation/test_bundles.py",
    "exporting/test_chunks.py", "exporting/test_hidden_states.py",
    "conversion/test_cli.py", "evidence/test_mutation_table.py", "lowering/test_trt.py", "compare/test_mutations.py",
    "lowering/test_ort.py", "test_wheel.py", "environment/test_stand_ins.py", "cli/test_dump_passes.py",
    "lora/test_lora.py", "exporting/test_fit_bits.py", "engine/test_rtx_shared.py", "engine/test_rtx_ranks.py",
    "trace/test_stamp.py", "trace/test_capture.py", "report/test_pytest_plugin.py", "report/test_polygraphy.py",
    "bisect/test_bisect.py",
    "checkpoint/test_gguf_families.py", "checkpoint/test_gguf.py", "cli/test_demo.py", "cli/test_trt.py",
    "engine/test_rtx_smollm2.py",
)
"""files that take long, the longest first, so that no worker sits alone with one at the end (a file stays with one)"""


def pytest_configure() -> None:
    """One cache holds every trace of a run, more than a user's: tests of many files export the same tiny models."""
    from gqa_export.trace import trace_cache

    trace_cache.KEPT = 1000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the order within a file and of the other files stays."""
    places = {name: place for place, name in enumerate(LONGEST)}
    root = os.path.dirname(__file__)
    items.sort(key=lambda item: places.get(os.path.relpath(item.path, root), len(places)))


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(tmp_path_factory) -> None:
    """Compiled kernels are kept for the whole run, shared by its workers; a user's own folder is not touched."""
    workers = tmp_path_factory.getbasetemp()
    shared = workers.parent if "PYTEST_XDIST_WORKER" in os.environ else workers
    os.environ.setdefault("GQA_EXPORT_KERNEL_CACHE", str(shared / "kernels"))


@pytest.fixture(scope="session")
def warm_folder(tmp_path_factory) -> Iterator[Path]:
    """A folder with a `gqa-export` whose imports are done; see `warm_program`."""
    from warm_program import put_in_front

    folder = tmp_path_factory.mktemp("warm")
    with put_in_front(folder):
        yield folder


@pytest.fixture(scope="session")
def program(warm_folder) -> Callable[..., subprocess.CompletedProcess]:
    """program("verb", ...) -> `gqa-export verb ...`, run in a process of its own, without the seconds of its imports.

    For tests of what a command does; that every verb starts by itself is shown once each (tests/cli, README).
    """
    def run(*words: object, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
        return subprocess.run([warm_folder / "gqa-export", *map(str, words)], cwd=cwd, capture_output=True, text=True,
                              timeout=timeout, check=False, stdin=subprocess.DEVNULL)

    return run


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Python's, NumPy's and (where it is loaded) PyTorch's generators start from the same state in every test."""
    import sys

    random.seed(SEED)
    np.random.seed(SEED)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(SEED)
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quick_polygraphy() -> None:
    """Once it is loaded; see `quick_polygraphy`."""
    quicken()
