"""Checkpoints from checkpoints: heads pooled (`convert`), and trained on (`uptrain`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .choices import (
    Grouping,
    Method,
    Place,
    check_choices,
)
from .sources import path_of, pickles_allowed

if TYPE_CHECKING:
    from ..conversion.convert import Conversion
    from ..progress import Progress
    from ..uptraining.uptrain import Uptraining


def convert(checkpoint: Place, output: Place, *, kv_heads: int | Sequence[int] | str, method: Method = "mean",
            grouping: Grouping = "contiguous", max_error: float | None = None, text: Place | None = None,
            tokens: int = 4096, seed: int = 0, revision: str | None = None, allow_pickle: bool = False,
            force: bool = False, ignore_unused: bool = False, progress: Progress | None = None) -> Conversion:
    """Write a checkpoint with fewer key/value heads: MHA to GQA to MQA.

    Args:
        checkpoint: folder or hub id, of `revision`. output: checkpoint folder to write.
        kv_heads: heads of every layer, of each layer, or "auto": the fewest within `max_error`.
        method: how a group of heads becomes one; "calibrated" needs `text`. grouping: which heads are pooled.
        max_error: with "auto", the largest relative error of a layer's attention output.
        text, tokens: a UTF-8 file, and how many of its tokens are used. seed: of method "random".
        ignore_unused: note tensors that the model does not use (they are copied); otherwise they are refused.

    Source: Ainslie et al., 2023 (arXiv:2305.13245).
    """
    from ..checkpoint.open import open_checkpoint
    from ..conversion.convert import convert as pool
    from ..conversion.options import ConvertOptions

    check_choices(method=method, grouping=grouping)
    heads = kv_heads if isinstance(kv_heads, str) else ",".join(
        map(str, [kv_heads] if isinstance(kv_heads, int) else kv_heads))
    options = ConvertOptions(heads, method, grouping, max_error, path_of(text), tokens, seed, force,
                             ignore_unused)
    with pickles_allowed(allow_pickle):
        return pool(open_checkpoint(checkpoint, revision=revision), Path(output), options, progress)


def uptrain(checkpoint: Place, output: Place, *, text: str, eval_text: str | None = None, held_out: float = 0.1,
            steps: int | None = None, fraction: float | None = None, pretraining_steps: int | None = None,
            length: int = 512, batch: int = 8, accumulate: int = 1, learning_rate: float = 2e-4, warmup: float = 0.05,
            weight_decay: float = 0.1, teacher: Place | None = None, distill_weight: float = 0.5,
            temperature: float = 1.0, bf16: bool = False, gradient_checkpointing: bool = False, seed: int = 0,
            eval_steps: int | None = None, eval_rows: int = 64, log_steps: int = 1, save_steps: int | None = None,
            restart: bool = False, allow_pickle: bool = False, force: bool = False, ignore_unused: bool = False,
            progress: Progress | None = None) -> Uptraining:
    """Continue the pre-training of a checkpoint that `convert` wrote. A run that was killed goes on when called again.

    Args:
        text: a UTF-8 file or "hub:NAME[:CONFIG[:SPLIT]]". eval_text: for evaluation; None is the end of `text`,
            `held_out` of it.
        steps: optimizer steps; or fraction of pretraining_steps; or neither: once through the text.
        length, batch, accumulate: tokens of a row, rows per device at once, batches that make one step.
        learning_rate, warmup, weight_decay: of AdamW; the rate follows a cosine.
        teacher: also learn from this model's distribution, with `distill_weight` at `temperature`.
        eval_steps, eval_rows, log_steps, save_steps: how often and on how much; None: ten times in all.
        restart: throw an unfinished run away instead of going on with it.
        ignore_unused: note tensors that the model does not use (they are left out); otherwise they are refused.
    """
    from ..checkpoint.open import open_checkpoint
    from ..uptraining.options import UptrainOptions
    from ..uptraining.uptrain import uptrain as train

    options = UptrainOptions(
        text, eval_text or "", held_out, steps or 0, fraction or 0.0, pretraining_steps or 0, length, batch, accumulate,
        learning_rate, warmup, weight_decay, str(teacher or ""), distill_weight, temperature, bf16,
        gradient_checkpointing, seed, eval_steps or 0, eval_rows, log_steps, save_steps or 0, force, ignore_unused)
    with pickles_allowed(allow_pickle):
        return train(open_checkpoint(checkpoint), Path(output), options, progress, restart)
