"""Checkpoint folder -> uptrained checkpoint folder, with its curve. Survives being killed: run again, it goes on.

While it runs, everything is in `.NAME.uptrain` beside the output; the output appears complete, at the end.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.decided import decided_by_weights
from ..checkpoint.load_model import load_model
from ..checkpoint.tied_weights import untie
from ..checkpoint.tokenizer import tokenizer_files
from ..checkpoint.unused_tensors import unused_notes
from ..environment.versions import versions
from ..errors import GqaExportError, UnsupportedModel
from ..files.staging import check_folder, disk_errors, writing_folder
from ..progress import Progress, silent
from .curve import Point, picture, split_log
from .options import UptrainOptions, steps_of
from .rows import EVAL, TRAIN, Rows, prepare
from .work import claimed, on_first_rank, open_work, settings_of, work_folder

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

REPORT, PICTURE = "gqa_uptrain.json", "gqa_uptrain.svg"


@dataclass(frozen=True)
class Uptraining:
    """What a run did.

    Attributes:
        folder: the trained checkpoint.
        source: what was trained.
        steps: optimizer steps.
        tokens: of all steps together.
        perplexity_before: e to the mean loss on the held-out rows, before the first step.
        perplexity_after: the same after the last.
        train: training losses by step.
        held_out: losses on the held-out rows by step.
        settings: the options that change what is trained.
        resumed_at: the step at which an earlier start ended; None for a run in one piece.
        date: ISO 8601.
        versions: of torch, transformers and accelerate.
        notes: on the checkpoint.
    """

    folder: str
    source: str
    steps: int
    tokens: int
    perplexity_before: float
    perplexity_after: float
    train: tuple[Point, ...]
    held_out: tuple[Point, ...]
    settings: dict[str, Any]
    resumed_at: int | None
    date: str
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The report, as written beside the weights."""
        return json.dumps(asdict(self), indent=1) + "\n"


def uptrain(checkpoint: Checkpoint, output: Path, options: UptrainOptions, report: Progress | None = None,
            restart: bool = False) -> Uptraining:
    """Train a checkpoint and write the result. On an error the output is not written, and what was trained is kept for
    the next start.

    Args:
        checkpoint: an opened Hugging Face checkpoint.
        output: folder to write; it must not exist, or be an earlier result and `options.force` set.
        options: see `UptrainOptions`.
        report: progress, in steps; None reports nothing.
        restart: throw away what an unfinished run has trained.

    Returns:
        The curve and both perplexities; the same is in gqa_uptrain.json beside the weights.

    Raises:
        GqaExportError: options contradict one another or an unfinished run, the text cannot be read, or the training
            diverged.
        InvalidCheckpoint: the checkpoint's tokenizer cannot be loaded, or does not belong to the model.
    """
    import torch

    progress = report or silent
    output = Path(output)
    check_folder(output, force=options.force, marker=REPORT)
    if checkpoint.kind == "gguf":
        raise GqaExportError("a GGUF file cannot be trained", checkpoint.source,
                             "give the original Hugging Face checkpoint folder", code="E-UPTRAIN-GGUF")
    if checkpoint.quantized:
        raise UnsupportedModel(f"the checkpoint is quantized ({checkpoint.quantization}) and cannot be trained",
                               checkpoint.source, "train the original, unquantized checkpoint",
                               code="E-MODEL-QUANTIZED")
    work = work_folder(output)
    from ..checkpoint.quiet import quiet
    from .trainer import DistillingTrainer, Watch, arguments, last_checkpoint

    with disk_errors(work), quiet(), ExitStack() as held_locks:
        decided = decided_by_weights(checkpoint)
        notes = unused_notes(checkpoint, (), options.ignore_unused)
        config = decided.config
        longest = int(getattr(config, "max_position_embeddings", 0) or options.length)
        if options.length > longest:
            raise GqaExportError(f"rows of {options.length} tokens are longer than the model's {longest} positions",
                                 "--length", f"use --length {longest} or less", code="E-UPTRAIN-LENGTH")
        settings = arguments(options, work, 1, resuming=False)

        def begin() -> None:
            held_locks.enter_context(claimed(work))
            progress("comparing with an unfinished run" if work.exists() else "hashing what is trained", None, None)
            open_work(work, settings_of(checkpoint, options, settings.world_size), restart)
            progress("tokenizing the text", None, None)
            prepare(checkpoint.folder, work, options, config.vocab_size)

        on_first_rank(settings.process_index, settings.world_size, begin)
        found = last_checkpoint(work)
        train, held = Rows(work / TRAIN), Rows(work / EVAL, options.eval_rows)
        steps = steps_of(options, len(train), settings.world_size)
        settings = arguments(options, work, steps, resuming=found is not None)
        progress("loading the model", None, None)
        model = load_model(checkpoint, "fp32", attn_implementation="sdpa")
        model.config.use_cache = False  # type: ignore[union-attr]
        if decided.untied:
            untie(model.config)
        trainer = DistillingTrainer(
            model, settings, train_dataset=train, eval_dataset=held, callbacks=[Watch(progress)],
            teacher=_teacher(options, config, bf16=options.bf16), weight=options.distill_weight,
            temperature=options.temperature)
        _quiet(trainer)
        trainer.train(resume_from_checkpoint=str(found) if found else None)
        if not any(entry.get("step") == steps and "eval_loss" in entry for entry in trainer.state.log_history):
            trainer.evaluate()
        result = _result(checkpoint, output, options, steps, settings.world_size, trainer.state.log_history, found,
                         notes)
        state = trainer.accelerator.get_state_dict(trainer.model)
        if trainer.is_world_process_zero():
            dtype = getattr(torch, checkpoint.stored_dtype)
            _write(checkpoint, trainer.accelerator.unwrap_model(trainer.model), state, dtype, output, options, result)
            train.close()
            held.close()
            shutil.rmtree(work)
        trainer.accelerator.wait_for_everyone()
    return result


def _teacher(options: UptrainOptions, config: Any, *, bf16: bool) -> Any:
    if not options.teacher:
        return None
    from ..checkpoint.open import open_checkpoint

    teacher = open_checkpoint(options.teacher)
    unused_notes(teacher, (), options.ignore_unused)
    size = decided_by_weights(teacher).config.vocab_size
    if size != config.vocab_size:
        raise GqaExportError(f"the teacher's vocabulary has {size} tokens, the student's {config.vocab_size}",
                             options.teacher, "use the checkpoint that was converted as the teacher",
                             code="E-UPTRAIN-TEACHER")
    return load_model(teacher, "bf16" if bf16 else "fp32", attn_implementation="sdpa")


def _quiet(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


def _result(checkpoint: Checkpoint, output: Path, options: UptrainOptions, steps: int, processes: int,
            history: list[dict[str, Any]], found: Path | None, notes: tuple[str, ...]) -> Uptraining:
    train, held = split_log(history)
    tokens = steps * options.batch * options.accumulate * options.length * processes
    return Uptraining(str(output), checkpoint.source, steps, tokens, held[0].perplexity, held[-1].perplexity,
                      tuple(train), tuple(held), json.loads(options.settings()),
                      int(found.name.rpartition("-")[2]) if found else None, date.today().isoformat(),
                      versions(("torch", "transformers", "accelerate")), notes)


def _write(checkpoint: Checkpoint, model: Any, state: dict[str, Any], dtype: Any, output: Path,
           options: UptrainOptions, result: Uptraining) -> None:
    with writing_folder(output, force=options.force, marker=REPORT) as folder:
        model.config.use_cache = checkpoint.config.get("use_cache", True)
        model.to(dtype)
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        model.save_pretrained(folder, state_dict=state)
        for file in [*tokenizer_files(checkpoint), checkpoint.folder / "gqa_convert.json"]:
            if file.name != "config.json" and file.is_file():
                shutil.copyfile(file, folder / file.name)
        (folder / REPORT).write_text(result.to_json(), encoding="utf-8")
        curves = {"training": result.train, "held out": result.held_out}
        (folder / PICTURE).write_text(picture(f"Uptraining {Path(checkpoint.source).name}", curves), encoding="utf-8")
