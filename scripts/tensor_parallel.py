"""Every supported architecture cut over ranks, exported and compared with PyTorch as one merged graph; resumable.

    python scripts/tensor_parallel.py                    # all that are missing, over 2 ranks
    python scripts/tensor_parallel.py --only llama,phi3 --again
    python scripts/tensor_parallel.py --families         # the seven families over 2, 3, 4 and 8 ranks

Rows go to models/tensor_parallel.json as they come; docs/models.md is written from it and from models/matrix.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "models" / "tensor_parallel.json"
FAMILIES = ROOT / "docs" / "benchmarks" / "tensor-parallel-families.json"


OTHER_TARGET = ("E-TARGET-LAYER",)
"""a target cannot hold a layer, cut or not: the other one is checked"""


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--again", action="store_true", help="also names that have a row")
    parser.add_argument("--families", action="store_true", help="the families of evidence.tensor_parallel_check")
    parser.add_argument("--limit", type=int, default=240, help="seconds of CPU time for one row")
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
                      TRANSFORMERS_VERBOSITY="error")
    place = FAMILIES if arguments.families else DATA
    rows = json.loads(place.read_text()) if place.exists() else {}
    names = arguments.only.split(",") if arguments.only else (families() if arguments.families else supported())
    if not arguments.again:
        names = [name for name in names if name not in rows]
    warm()
    began = time.perf_counter()
    for number, name in enumerate(names, 1):
        row = in_a_fork(name, arguments)
        rows = json.loads(place.read_text()) if place.exists() else {}
        rows[name] = row
        temporary = place.with_suffix(".part")
        temporary.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
        temporary.replace(place)
        print(f"{number}/{len(names)} {time.perf_counter() - began:.0f}s {name}: {row['verdict']} "
              f"{row.get('reason', '')[:300]}", flush=True)
    if not arguments.families:
        from matrix import write_document

        write_document()


def supported() -> list[str]:
    """Names of the architectures that are supported and keep keys and values only."""
    table = json.loads((ROOT / "models" / "matrix.json").read_text())["rows"]
    return [name for name, row in table.items() if row["verdict"] == "supported" and not row.get("states")]


def families() -> list[str]:
    """Rows of the families: `name/ranks/target`."""
    from evidence.tensor_parallel_check import FAMILIES as KNOWN
    from evidence.tensor_parallel_check import RANKS

    return [f"{name}/{ranks}/{target}" for name, (targets, _) in KNOWN.items() for ranks in RANKS for target in targets]


def warm() -> None:
    """Export one model, so that a fork finds everything imported."""
    import warnings

    import torch
    import transformers
    from evidence.tensor_parallel_check import check_family

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="gqa-tp-") as work:
        row = check_family("llama", 2, "trt-native", Path(work))
    if row["verdict"] != "sharded":
        sys.exit(f"the plainest architecture does not pass: {row}")


def in_a_fork(name: str, arguments: argparse.Namespace) -> dict:
    """One row, made in a child that may die or hang."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_CPU, (arguments.limit, arguments.limit))
        with tempfile.TemporaryDirectory(prefix="gqa-tp-") as work, os.fdopen(write, "w") as out:
            json.dump(row_of(name, Path(work), families=arguments.families), out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answers:
        text = answers.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"verdict": "failed", "reason": "the process ended without an answer"}


def row_of(name: str, work: Path, *, families: bool) -> dict:
    """A row of either table."""
    from evidence.tensor_parallel_check import check, check_family
    from gqa_models.shrink import write_small

    if families:
        family, ranks, target = name.split("/")
        return check_family(family, int(ranks), target, work)
    checkpoint = write_small(name, work / "checkpoint")
    row = check(checkpoint, 2, "trt-plugin", work)
    if row.get("code") in OTHER_TARGET:
        row = {**check(checkpoint, 2, "trt-native", work), "target": "trt-native"}
    return row


if __name__ == "__main__":
    main()
