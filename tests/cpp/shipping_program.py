"""Run in a process of its own, with the stand-in for CUDA first on LD_LIBRARY_PATH: the shipping path of gpu_check.

Arguments: gqa_attend, the stand-in's libcuda.so.1. Prints the rows and notes as JSON; launches go to GQA_STUB_LOG.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts"))
import gpu_check
from evidence import shipping_path, stub_gpu

program, library = map(Path, sys.argv[1:])
shipping_path.build_harness = lambda _: (program, "")
with stub_gpu.in_place_of_a_gpu(gpu_check, library):
    import torch

    torch.manual_seed(0)
    print(json.dumps(shipping_path.check_all(torch.device("cpu"), 90, None)))
