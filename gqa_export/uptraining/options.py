"""What an uptraining run is asked for, and how many steps that is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import GqaExportError

FREE = ("save_steps", "force", "log_steps", "eval_rows")
"""options that may differ when a run is resumed: they change no number that is trained"""


@dataclass(frozen=True)
class UptrainOptions:
    """What `gqa-export uptrain` takes. steps: optimizer steps of this run; or fraction * pretraining_steps (alpha of
    the paper); or neither: once through the text. batch: rows of `length` tokens per device and step, times
    accumulate. held_out: part of the text, its end, that is only evaluated on, where there is no eval_text."""

    text: str
    eval_text: str = ""
    held_out: float = 0.1
    steps: int = 0
    fraction: float = 0.0
    pretraining_steps: int = 0
    length: int = 512
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-4
    warmup: float = 0.05
    weight_decay: float = 0.1
    teacher: str = ""
    distill_weight: float = 0.5
    temperature: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    eval_steps: int = 0
    eval_rows: int = 64
    log_steps: int = 1
    save_steps: int = 0
    force: bool = False

    def settings(self) -> str:
        """What must be equal for a run to be resumed, as JSON."""
        chosen = {name: value for name, value in asdict(self).items() if name not in FREE}
        for name in ("text", "eval_text", "teacher"):
            if chosen[name] and Path(chosen[name]).exists():
                chosen[name] = str(Path(chosen[name]).resolve())
        return json.dumps(chosen, indent=1, sort_keys=True) + "\n"


def steps_of(options: UptrainOptions, rows: int, processes: int = 1) -> int:
    """Optimizer steps of the run. rows: training rows that there are. GqaExportError for options that contradict."""
    if options.steps and options.fraction:
        raise GqaExportError("--steps and --fraction both say how long to train", "--fraction",
                             "leave one of them away")
    if bool(options.fraction) != bool(options.pretraining_steps):
        raise GqaExportError("--fraction is a part of the steps of the original pre-training",
                             "--fraction, --pretraining-steps", "give both, or --steps alone")
    if options.steps:
        return options.steps
    if options.fraction:
        return max(1, round(options.fraction * options.pretraining_steps))
    return max(1, rows // (options.batch * options.accumulate * processes))
