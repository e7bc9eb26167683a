"""Where the CPU time of a first export goes: run as a program, in one process, and by `phases` in a new one each time.

The program imports what an export imports, one package after another, and then exports; the stages that the export
reports divide the rest. The phases are of the main thread; weights are copied in another one meanwhile. The sum is what
`gqa-export onnx` takes, but for the command line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gqa_export.cli import in_one_block

from .whole_process import child_environment

PHASES = ("interpreter", "import torch", "import transformers", "import the modelling code",
          "import onnx, onnxscript and torch.onnx", "trace", "lower", "write", "copy weights, beside all of these")
OF_STAGE = {"reading the checkpoint": "trace", "tracing": "trace", "fusing": "lower", "lowering": "lower",
            "placing weights": "write", "writing weights": "write"}
"""the phase that begins with a stage of the export"""


def phases(checkpoint: Path, scratch: Path, runs: int) -> dict[str, list[float]]:
    """CPU seconds of each phase in each of `runs` exports of `checkpoint`, weights copied, by phase."""
    rows = []
    for number in range(runs):
        done = subprocess.run([sys.executable, "-m", "evidence.export_phases", str(checkpoint),
                               str(scratch / f"phases-{number}")], capture_output=True, text=True, check=True,
                              cwd=Path(__file__).parent.parent,
                              env=child_environment({"GQA_EXPORT_TRACE_CACHE": "off"}))
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return {phase: [row[phase] for row in rows] for phase in PHASES}


def table(result: dict[str, list[float]]) -> list[str]:
    """The medians as lines of a page, with the sum."""
    medians = {phase: statistics.median(values) for phase, values in result.items()}
    total = sum(medians.values())
    return ["| phase | CPU s | share |", "|---|---|---|",
            *(f"| {phase} | {value:.2f} | {value / total:.0%} |" for phase, value in medians.items()),
            f"| together | {total:.2f} | |"]


def main(checkpoint: str, output: str) -> None:
    """Export once and print the seconds of every phase."""
    spent = dict.fromkeys(PHASES, 0.0)
    mark = 0.0

    def ends(phase: str) -> None:
        nonlocal mark
        now = time.thread_time()
        spent[phase] += now - mark
        mark = now

    from gqa_export.cli.onnx import no_collection
    from gqa_export.environment.stand_ins import stand_in

    collection = contextlib.ExitStack()
    collection.enter_context(no_collection())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    stand_in()
    ends("interpreter")
    import torch

    assert torch
    ends("import torch")
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    ends("import transformers")
    model = transformers.AutoModelForCausalLM
    assert model._model_mapping[type(config)]
    ends("import the modelling code")
    import gqa_export.exporting.to_onnx
    from gqa_export.trace.capture.export import OPSET
    from gqa_export.trace.capture.translate import library

    assert gqa_export.exporting.to_onnx
    library(OPSET)
    ends("import onnx, onnxscript and torch.onnx")
    current = "trace"

    def report(stage: str, done: int | None, total: int | None) -> None:
        nonlocal current
        ends(current)
        current = OF_STAGE[stage]

    import gqa_export

    gqa_export.export(checkpoint, output, dtype="fp32", progress=report)
    ends(current)
    spent[PHASES[-1]] = time.process_time() - time.thread_time()
    collection.close()
    print(json.dumps(spent))


if __name__ == "__main__":
    in_one_block(main)(*sys.argv[1:])
