"""What every test relies on: no network, one thread a process, the same random numbers each time."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers with two threads each on two cores only wait
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

if "GQA_EXPORT_TRACE_CACHE" not in os.environ:  # set once by the first process; workers and commands inherit it
    os.environ["GQA_EXPORT_TRACE_CACHE"] = tempfile.mkdtemp(prefix="gqa-traces-")
    atexit.register(shutil.rmtree, os.environ["GQA_EXPORT_TRACE_CACHE"], ignore_errors=True)

import numpy as np
import pytest

SEED = 20260101


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
