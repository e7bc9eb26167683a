"""The options of an uptraining run, and how many steps they make."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import GqaExportError

FREE = ("save_steps", "force", "ignore_unused", "log_steps", "eval_rows")
"""options that may differ when a run is resumed: they change no number that is trained"""


@dataclass(frozen=True)
class UptrainOptions:
    """What `gqa-export uptrain` takes.

    Attributes:
        text: a text file, or hub:NAME[:CONFIG[:SPLIT]].
        eval_text: the same, to evaluate on; "" takes the end of `text`.
        held_out: the part of `text` that is only evaluated on where there is no eval_text.
        steps: optimizer steps of this run; 0 takes fraction * pretraining_steps, or once through the text.
        fraction: alpha of the paper, of pretraining_steps.
        pretraining_steps: steps of the original pre-training.
        length: tokens per row.
        batch: rows per device and step, times accumulate.
        accumulate: batches per optimizer step.
        learning_rate: at its highest.
        warmup: part of the steps.
        weight_decay: of AdamW.
        teacher: a checkpoint to distill from; "" is none.
        distill_weight: of the teacher's part of the loss, 0 to 1.
        temperature: of the distillation.
        bf16: train in bfloat16 (autocast).
        gradient_checkpointing: recompute activations, for less memory.
        seed: of the order of rows.
        eval_steps: steps between evaluations; 0 is a tenth of the run.
        eval_rows: the most rows to evaluate on; 0 is all.
        log_steps: steps between entries of the log.
        save_steps: steps between checkpoints; 0 as eval_steps.
        force: replace an earlier result.
        ignore_unused: note tensors that the model does not use, instead of refusing them; they are left out.
    """

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
    ignore_unused: bool = False

    def settings(self) -> str:
        """The options that change what is trained, as JSON, paths resolved."""
        chosen = {name: value for name, value in asdict(self).items() if name not in FREE}
        for name in ("text", "eval_text", "teacher"):
            if chosen[name] and Path(chosen[name]).exists():
                chosen[name] = str(Path(chosen[name]).resolve())
        return json.dumps(chosen, indent=1, sort_keys=True) + "\n"


def steps_of(options: UptrainOptions, rows: int, processes: int = 1) -> int:
    """Optimizer steps of the run.

    Args:
        options: see `UptrainOptions`.
        rows: training rows that there are.
        processes: that share a step.

    Raises:
        GqaExportError: options contradict one another.
    """
    if options.steps and options.fraction:
        raise GqaExportError("--steps and --fraction both set the number of steps", "--fraction",
                             "leave one of them away", code="E-UPTRAIN-STEPS-TWICE")
    if bool(options.fraction) != bool(options.pretraining_steps):
        raise GqaExportError("--fraction is a part of the steps of the original pre-training",
                             "--fraction, --pretraining-steps", "give both, or --steps alone",
                             code="E-UPTRAIN-FRACTION")
    if options.steps:
        return options.steps
    if options.fraction:
        return max(1, round(options.fraction * options.pretraining_steps))
    return max(1, rows // (options.batch * options.accumulate * processes))
