"""Loss, agreement and copying of a model with approximate attention, against itself with exact attention.

One sequence serves all: n - A tokens of a text, then its first A tokens again. Loss is taken behind the first leaf and
before the repetition, copying on the last three quarters of the repetition.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..compare.long_quality import LengthQuality
from ..errors import GqaExportError
from ..long_attention_op import LongSetting
from ..spec import ModelSpec
from .attention import Replacement, Watch, refuse_unreached, replaced

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

MOST_ROWS = 1024
"""rows on which loss is taken: 1024 rows of 150k logits are 0.6 GB"""
EIGHTHS = 8


def text_tokens(checkpoint: Checkpoint, text: Path, most: int) -> np.ndarray:
    """At most `most` token ids of a text.

    Raises:
        GqaExportError: the text or the tokenizer cannot be read.
    """
    from ..checkpoint.quiet import quiet
    from ..checkpoint.tokenized_text import load_tokenizer, read_beginning, tokenize

    words = read_beginning(text, 16 * most).text
    if checkpoint.gguf_file is None:
        return tokenize(load_tokenizer(checkpoint.folder), words)[:most]
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, gguf_file=checkpoint.gguf_file.name,
                                                  local_files_only=True, trust_remote_code=False)
    return tokenize(tokenizer, words)[:most]


def passage_of(length: int) -> int:
    """Tokens at the beginning of a sequence that come again at its end."""
    return min(512, length // 8)


def shortest_length(leaf: int) -> int:
    """The fewest tokens that something can be measured on: two leaves, and a passage with a row to predict."""
    body = 2 * leaf + 2
    return max(16, min(body + (body - 1) // 7, body + 512))


def longest_length(tokens: int) -> int:
    """The longest sequence that a text of so many tokens makes."""
    return tokens + min(512, tokens // 7)


@dataclass
class Sequence:
    """A text with its beginning repeated at the end: ids [n], and the rows at which something is measured."""

    ids: np.ndarray
    passage: int
    leaf: int

    @classmethod
    def of(cls, tokens: np.ndarray, length: int, leaf: int, where: str) -> Sequence:
        """From the first tokens of a text.

        Raises:
            GqaExportError: the text is too short, or the length too short for its leaf.
        """
        passage = passage_of(length)
        if length < shortest_length(leaf):
            raise GqaExportError(f"{length} tokens are too few to measure with leaf {leaf}", "--lengths",
                                 f"use at least {max(4 * leaf, shortest_length(leaf))}, or a smaller --long-leaf",
                                 code="E-OPTION-LENGTHS")
        if len(tokens) < length - passage:
            raise GqaExportError(f"the text has {len(tokens)} tokens, {length - passage} are needed", where,
                                 "give a longer text, or smaller --lengths", code="E-FILE-TEXT-SHORT")
        body = tokens[: length - passage].astype(np.int64)
        return cls(np.concatenate([body, body[:passage]]), passage, leaf)

    @property
    def loss_rows(self) -> np.ndarray:
        """Behind the first leaf, before the repetition, evenly spread."""
        rows = np.arange(self.leaf, len(self.ids) - self.passage - 1)
        return rows[:: -(-len(rows) // MOST_ROWS)]

    @property
    def first_rows(self) -> np.ndarray:
        """The last three quarters of the passage when it first comes."""
        return np.arange(self.passage // 4, self.passage - 1)

    @property
    def copy_rows(self) -> np.ndarray:
        """The same when it comes again."""
        return self.first_rows + len(self.ids) - self.passage


@dataclass(frozen=True)
class Outcome:
    """What one run gave. log_probabilities: of the loss rows, [rows, V]. nll, copy, first: nats at each row."""

    log_probabilities: torch.Tensor
    nll: torch.Tensor
    copy: torch.Tensor
    first: torch.Tensor
    seconds: float


@dataclass
class Prefix:
    """The outputs of every decoder layer in an exact run, so that another run starts where it differs."""

    layers: Any
    outputs: dict[int, Any] = field(default_factory=dict)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what every layer gives, inside."""
        handles = [layer.register_forward_hook(lambda module, given, output, number=number:
                                               self.outputs.__setitem__(number, output))
                   for number, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def skipped(self, first: int) -> Iterator[None]:
        """Layers before `first` give what they gave, inside."""
        if any(number not in self.outputs for number in range(first)):
            first = 0
        before = [layer.forward for layer in self.layers[:first]]
        for number, layer in enumerate(self.layers[:first]):
            layer.forward = lambda *args, _number=number, **kwargs: self.outputs[_number]
        try:
            yield
        finally:
            for layer, forward in zip(self.layers[:first], before):
                layer.forward = forward


def run(model: Any, sequence: Sequence, replacement: Replacement) -> Outcome:
    """One pass over the sequence."""
    rows = np.concatenate([sequence.loss_rows, sequence.first_rows, sequence.copy_rows])
    ids = torch.from_numpy(sequence.ids)
    started = time.perf_counter()
    with torch.inference_mode(), replaced(replacement):
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=torch.from_numpy(rows)).logits[0]
    seconds = time.perf_counter() - started
    if len(logits) != len(rows):  # a model that does not know the argument gives every row
        logits = logits[torch.from_numpy(rows)]
    logs = torch.log_softmax(logits.float(), -1)
    nll = -logs.gather(1, ids[rows + 1][:, None])[:, 0]
    counts = [len(sequence.loss_rows), len(sequence.first_rows), len(sequence.copy_rows)]
    loss, first, copy = nll.split(counts)
    return Outcome(logs[: counts[0]], loss, copy, first, seconds)


def compare(exact: Outcome, other: Outcome, tokens: int) -> LengthQuality:
    """The figures of an approximated run beside an exact one."""
    same = (exact.log_probabilities.argmax(-1) == other.log_probabilities.argmax(-1)).double()
    kl = (exact.log_probabilities.exp() * (exact.log_probabilities - other.log_probabilities)).sum(-1)
    parts = tuple(round(float(part.mean()), 6) for part in torch.tensor_split(same, EIGHTHS) if len(part))
    return LengthQuality(tokens, float(exact.nll.mean()), float(other.nll.mean()), float(kl.mean()),
                         float(same.mean()), parts, float(exact.first.mean()), float(exact.copy.mean()),
                         float(other.copy.mean()), exact.seconds, other.seconds)


class Measurement:
    """A model and a sequence, its exact run known: quality for any set of layers."""

    def __init__(self, model: Any, spec: ModelSpec, setting: LongSetting, seed: int, sequence: Sequence,
                 source: str) -> None:
        from ..checkpoint.decoder_layers import layer_lists

        self.model, self.spec, self.sequence = model, spec, sequence
        self._base = Replacement(spec, setting, seed)
        found = next(layer_lists(model, spec.depth), None)
        self._prefix = Prefix(found[1] if found else [])
        first = replace(self._base, reached=set(), seconds={})
        with self._prefix.recorded():
            self.exact = run(model, sequence, first)
        refuse_unreached(first, source)

    def use(self, setting: LongSetting) -> None:
        """Another setting with the same leaf: the exact run and its rows stay."""
        self._base = replace(self._base, setting=setting)

    def look(self, watch: Watch) -> None:
        """One more exact pass, in which `watch` sees every layer."""
        run(self.model, self.sequence, replace(self._base, watch=watch, reached=set(), seconds={}))

    def of(self, layers: tuple[int, ...], *, whole: bool = False) -> LengthQuality:
        """Quality with these layers approximated. whole: run every layer, so that the time is that of a model."""
        replacement = replace(self._base, layers=frozenset(layers), reached=set(), seconds={})
        with self._prefix.skipped(0 if whole else min(layers)):
            other = run(self.model, self.sequence, replacement)
        return compare(self.exact, other, len(self.sequence.ids))
