"""What goes into a step: refusals before anything runs, the attention mask, and how a batch must be cut.

Dimensions: B batch, S new tokens (padded on the right), P past tokens, C capacity. Everything here is host-side
numpy; a kernel that could write past its cache is never reached.
"""

from __future__ import annotations

import numpy as np

from ..errors import GqaExportError
from ..graph_io import ATTENTION_MASK, INPUT_IDS, NEW_LENGTHS, PAST_LENGTHS
from .session import Step


def check_feed(input_ids: np.ndarray, new_lengths: np.ndarray | None, lengths: np.ndarray, capacity: int,
               vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Refuse a step that must not run.

    Args:
        input_ids: integers `[batch, new]`, padded on the right.
        new_lengths: `[batch]`, valid ids of each row; None: all.
        lengths: `[batch]`, tokens in the cache.
        capacity: tokens that a sequence may reach. vocabulary: ids are below it.

    Returns:
        The ids (0 in the padding) and the new lengths, both int64.

    Raises:
        GqaExportError: the shapes do not fit, an id is outside the vocabulary, a sequence would exceed the capacity.
    """
    ids = np.asarray(input_ids)
    batch = len(lengths)
    if ids.ndim != 2 or ids.shape[0] != batch or ids.shape[1] == 0:
        raise GqaExportError(f"input_ids has shape {list(ids.shape)}, expected [{batch}, S] with S >= 1", "input_ids",
                             "call reset(batch) with the number of sequences first, and feed at least one token",
                             code="E-RUN-SHAPE")
    if not np.issubdtype(ids.dtype, np.integer):
        raise GqaExportError(f"input_ids is {ids.dtype}, expected whole numbers", "input_ids", "pass int64 token ids",
                             code="E-RUN-TYPE")
    new = np.full(batch, ids.shape[1]) if new_lengths is None else _counts(new_lengths, batch, ids.shape[1])
    ids, new = ids.astype(np.int64), new.astype(np.int64)
    real = None if new_lengths is None else np.arange(ids.shape[1])[None] < new[:, None]
    if real is not None or ids.min() < 0 or ids.max() >= vocabulary:
        wrong = (ids < 0) | (ids >= vocabulary)
        wrong = wrong if real is None else wrong & real
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            raise GqaExportError(f"token id {ids[row, column]} is outside the vocabulary of {vocabulary}",
                                 f"sequence {row}, new token {column}",
                                 "use the tokenizer of this model; ids start at 0", code="E-RUN-VOCABULARY")
    if (lengths + new).max() > capacity:
        row = int(np.argmax(lengths + new > capacity))
        raise GqaExportError(
            f"the cache holds {capacity} tokens, and sequence {row} would have {int(lengths[row] + new[row])}",
            f"sequence {row}: {int(lengths[row])} tokens in the cache, {int(new[row])} new",
            f"shorten the prompt, or export with --capacity {int((lengths + new).max())} or more",
            code="E-RUN-CAPACITY")
    return ids if real is None else np.where(real, ids, 0), new


def _counts(new_lengths: np.ndarray, batch: int, sequence: int) -> np.ndarray:
    """The new lengths, as whole numbers within 0 .. sequence."""
    new = np.asarray(new_lengths)
    if new.shape != (batch,) or not np.issubdtype(new.dtype, np.integer):
        raise GqaExportError(f"new_lengths is {new.dtype} {list(new.shape)}, expected whole numbers [{batch}]",
                             "new_lengths", "pass one count per sequence; of a tokenizer's attention mask that is "
                             'mask.sum(axis=1), if the tokenizer pads on the right: padding_side="right"',
                             code="E-RUN-LENGTHS")
    if new.min() < 0 or new.max() > sequence:
        raise GqaExportError(f"new_lengths {new.tolist()} is not within 0..{sequence}", "new_lengths",
                             "count the real tokens of each row of input_ids", code="E-RUN-LENGTHS")
    return new


def attention_mask(lengths: np.ndarray, new: np.ndarray, past: int, sequence: int, *,
                   whole_row: bool = False) -> np.ndarray:
    """int64 [B, past + sequence]: lengths[b] ones in the first `past` columns, new[b] ones in the last `sequence`.
    whole_row: all of a row's ones first, as onnxruntime-genai's Engine sends them to targets that take both."""
    if whole_row:
        return (np.arange(past + sequence)[None] < (lengths + new)[:, None]).astype(np.int64)
    if min(lengths.tolist()) == past and min(new.tolist()) == sequence:
        return np.ones((len(lengths), past + sequence), np.int64)
    columns = np.arange(past)[None] < lengths[:, None]
    return np.concatenate([columns, np.arange(sequence)[None] < new[:, None]], axis=1).astype(np.int64)


def step_feed(interface: str, ids: np.ndarray, lengths: np.ndarray, new: np.ndarray,
              past: int, *, whole_row: bool = False) -> dict[str, np.ndarray]:
    """All inputs of a step but the cache, by name. interface: "mask" or "lengths", as in `graph_io.graph_inputs`.
    past: length of the past axis as far as the mask is to reach. whole_row: see `attention_mask`."""
    if interface == "lengths":
        return {INPUT_IDS: ids.astype(np.int32), PAST_LENGTHS: lengths.astype(np.int32),
                NEW_LENGTHS: new.astype(np.int32)}
    return {INPUT_IDS: ids, ATTENTION_MASK: attention_mask(lengths, new, past, ids.shape[1], whole_row=whole_row)}


def must_run_alone(lengths: np.ndarray, new: np.ndarray, sequence: int, *, capacity: int | None,
                   chunks_alone: bool, empty_alone: bool) -> bool:
    """Whether the rows of this step have to run one by one, each without padding.

    capacity: C of a static cache, None for a growing one: padding that reaches past the end of a static buffer
    would be written there. chunks_alone, empty_alone: what the target's attention cannot do at batch > 1.
    """
    held, fed = lengths.tolist(), new.tolist()  # of so few numbers numpy would take longer
    if not any(fed):
        return True
    if capacity is not None and max(held) + sequence > capacity:
        return True
    if empty_alone and 0 in fed:
        return True
    return chunks_alone and len(held) > 1 and sequence > 1 and any(held)


def written_rows(present_BKTD: np.ndarray, lengths: np.ndarray, new: np.ndarray, sequence: int) -> np.ndarray:
    """[B, K, S, D]: what a step wrote at lengths[b] .. lengths[b] + new[b] - 1; zeros in the padding. Of a ring, whose
    axis is shorter than what its rows hold, at those places modulo the axis."""
    batch, heads, axis, size = present_BKTD.shape
    rows = np.zeros((batch, heads, sequence, size), dtype=present_BKTD.dtype)
    for b, (start, count) in enumerate(zip(lengths.tolist(), new.tolist())):
        if start + count <= axis:
            rows[b, :, :count] = present_BKTD[b, :, start: start + count]
        else:
            rows[b, :, :count] = present_BKTD[b][:, (start + np.arange(count)) % axis]
    return rows


def chunks_of(sequence: int, chunk: int, new: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """How a step of `sequence` new tokens is cut: (first, last + 1, new tokens of each row) of every piece."""
    return [(start, min(start + chunk, sequence), np.clip(new - start, 0, chunk))
            for start in range(0, sequence, chunk)]


def joined(steps: list[Step], news: list[np.ndarray], last_only: bool) -> Step:
    """What the pieces of a step gave, as if it had come at once. last_only: one row of logits for each piece, that of
    a row's last token."""
    logits = steps[0].logits
    for step, new in zip(steps[1:], news[1:], strict=True):
        logits = (np.where((new > 0)[:, None, None], step.logits, logits) if last_only
                  else np.concatenate([logits, step.logits], axis=1))
    parts = [step.hidden for step in steps if step.hidden is not None]
    hidden = np.concatenate(parts, axis=1) if parts else None
    if steps[0].keys is None:
        return Step(logits, hidden=hidden)
    keys, values = (tuple(np.concatenate([(getattr(step, kind) or ())[i] for step in steps], axis=2)
                          for i in range(len(steps[0].keys))) for kind in ("keys", "values"))
    return Step(logits, keys, values, steps[-1].states, hidden)
