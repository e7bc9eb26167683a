"""Hugging Face's Trainer with three additions: distillation, our progress line, and an end when the loss diverges."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..errors import GqaExportError
from .options import UptrainOptions

STATE = "trainer_state.json"


class DistillingTrainer(Trainer):
    """With a teacher, the training loss is (1 - w) * cross-entropy + w * t^2 * KL(teacher || student) at temperature t;
    evaluation is cross-entropy alone. Source: Hinton et al., 2015 (arXiv:1503.02531)."""

    def __init__(self, *given: Any, teacher: torch.nn.Module | None, weight: float, temperature: float,
                 **named: Any) -> None:
        super().__init__(*given, **named)
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        if teacher is not None:
            teacher.to(self.args.device).requires_grad_(False).eval()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:
        """See Trainer.compute_loss."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad():
            wanted = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
        count = inputs["labels"][:, 1:].numel() if num_items_in_batch is None else num_items_in_batch
        several = self.accelerator.num_processes if self.args.average_tokens_across_devices and \
            num_items_in_batch is not None else 1
        apart = divergence(outputs.logits[:, :-1], wanted[:, :-1], self.temperature) / count * several
        loss = (1 - self.weight) * loss + self.weight * self.temperature**2 * apart
        return (loss, outputs) if return_outputs else loss


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) of softened distributions, summed over all tokens, in fp32."""
    ours = torch.log_softmax(student.float() / temperature, dim=-1)
    theirs = torch.log_softmax(teacher.float() / temperature, dim=-1)
    return (theirs.exp() * (theirs - ours)).sum()


class Watch(TrainerCallback):
    """Reports where the run is; ends it when the loss is not a finite number."""

    def __init__(self, report: Callable[[str, float | None, float | None], None]) -> None:
        self.report, self.last = report, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Called with every line of the log."""
        for name, text in (("loss", "loss"), ("eval_loss", "held-out loss")):
            value = (logs or {}).get(name)
            if value is None:
                continue
            if not math.isfinite(float(value)):
                raise GqaExportError(f"training diverged: the {text} after {state.global_step} steps is {value}",
                                     "--learning-rate", "pass --restart with a smaller --learning-rate, or without "
                                     "--bf16", code="E-UPTRAIN-DIVERGED")
            self.last = f"{text} {float(value):.3f}"
        self.report(f"step {state.global_step} of {state.max_steps}: {self.last}", state.global_step, state.max_steps)


def arguments(options: UptrainOptions, work: Path, steps: int, *, resuming: bool) -> TrainingArguments:
    """Trainer's own settings for these options. Without a GPU it trains on the CPU."""
    often = options.eval_steps or max(1, steps // 10)
    accelerator = torch.accelerator.is_available()
    named = {field.name for field in fields(TrainingArguments)}
    checkpointing: Any = {"activation_checkpointing" if "activation_checkpointing" in named
                          else "gradient_checkpointing": options.gradient_checkpointing}
    return TrainingArguments(
        output_dir=str(work), max_steps=steps, per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch, gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate, lr_scheduler_type="cosine", warmup_steps=math.ceil(options.warmup * steps),
        weight_decay=options.weight_decay, adam_beta2=0.95, max_grad_norm=1.0, bf16=options.bf16,
        use_cpu=not accelerator, **checkpointing,
        seed=options.seed, data_seed=options.seed,
        eval_strategy="steps", eval_steps=often, eval_on_start=not resuming, prediction_loss_only=True,
        logging_strategy="steps", logging_steps=options.log_steps, logging_nan_inf_filter=False,
        save_strategy="steps", save_steps=options.save_steps or often, save_total_limit=2, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=accelerator, log_level="error")


def last_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint of an earlier start; one whose writing was cut off is not looked at."""
    found = {int(path.name.rpartition("-")[2]): path for path in work.glob("checkpoint-*")
             if path.name.rpartition("-")[2].isdigit() and (path / STATE).is_file()}
    return found[max(found)] if found else None
