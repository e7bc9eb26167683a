"""Pairs of sessions to compare: PyTorch against PyTorch, and a scripted decoder whose every number is chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from gqa_export.checkpoint.load_model import load_model
from gqa_export.compare.cases import Plan, plan_cases
from gqa_export.compare.judge import judge
from gqa_export.compare.verdict import Verdict
from gqa_export.runtime.session import Step
from gqa_export.spec import AttentionSpec, ModelSpec
from gqa_export.validation.run_cases import run_cases
from gqa_export.validation.sessions import Sessions

CAPACITY = 96
STEPS = 32


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable:
    """name -> a tiny random model of transformers in fp32, loaded once per name."""
    from gqa_models import write_tiny

    from gqa_export.checkpoint.open import open_checkpoint

    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            loaded[name] = load_model(open_checkpoint(write_tiny(name, tmp_path_factory.mktemp(name))), "float32")
        return loaded[name]

    return load


def torch_spec(model) -> ModelSpec:
    """A spec as far as the cases need one: cache shapes as the model shows them, windows from its configuration."""
    from gqa_export.runtime.torch_session import TorchSession

    session, config = TorchSession(model, CAPACITY), model.config
    session.step(np.zeros((1, 1), np.int64))
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or 0
    layers = [AttentionSpec(i, config.num_attention_heads, key.shape[1], key.shape[3], value.shape[3], 1.0,
                            window=window if kinds is None or kinds[i] == "sliding_attention" else 0)
              for i, (key, value) in enumerate(session.cache())]
    return ModelSpec(config.model_type, "", session.vocabulary, config.hidden_size, CAPACITY, "", tuple(layers))


def torch_verdict(model, other, *, dtype: str = "float32", last_only: bool = False, steps: int = 8) -> Verdict:
    """Judge `other` as if it were a bundle of `model`."""
    from gqa_export.runtime.torch_session import TorchSession

    spec = torch_spec(model)
    plan = plan_cases(spec, CAPACITY, steps=steps, special=(0, 1, 2))
    sessions = Sessions(TorchSession(model, CAPACITY, "float64", spec=spec),
                        TorchSession(model, CAPACITY, dtype, spec=spec),
                        TorchSession(other, CAPACITY, dtype, spec=spec))
    return verdict_of(run_cases(sessions, plan, last_only=last_only), plan, dtype)


def verdict_of(logs, plan: Plan, dtype: str = "float32") -> Verdict:
    """A verdict whose facts about the bundle are made up."""
    return Verdict("bundle", "checkpoint", "ort", dtype, dtype, "float64", "cpu", "growing", CAPACITY,
                   tuple(judge(log, dtype) for log in logs), plan.notes)


def mutated(model, change: Callable):
    """A copy of the model, changed."""
    other = copy.deepcopy(model)
    change(other)
    return other


class Scripted:
    """A decoder of one layer (K = 2, D = 3) whose logits for position t are row t of a table, whatever is fed.

    edit(position, logits_V) and edit_key(position, key_KD) may change what a step gives, in place.
    """

    vocabulary = 12

    def __init__(self, edit: Callable = lambda t, x: None, edit_key: Callable = lambda t, x: None, *,
                 noise: float = 0.0, seed: int = 5) -> None:
        self.spec = ModelSpec("scripted", "", self.vocabulary, 6, 512, "",
                              (AttentionSpec(0, 2, 2, 3, 3, 1.0),))
        random = np.random.default_rng(seed)
        self.logit_table = random.normal(size=(256, self.vocabulary))
        self.key_table = random.normal(size=(256, 2, 3))
        if noise:
            self.logit_table += np.random.default_rng(99).uniform(-noise, noise, self.logit_table.shape)
        self.edit, self.edit_key, self.capacity = edit, edit_key, 256
        self.fed: list[np.ndarray] = []
        self.other_draws: dict[int, Scripted] = {}
        self.drawn: list[int] = []

    @contextmanager
    def redrawn(self, seed: int) -> Iterator[None]:
        """See `TorchSession.redrawn`: inside, the logits of `other_draws[seed]`, where there are any."""
        self.drawn.append(seed)
        before, self.logit_table = self.logit_table, self.other_draws.get(seed, self).logit_table
        yield
        self.logit_table = before

    def reset(self, batch: int) -> None:
        """Start again."""
        self.lengths = np.zeros(batch, np.int64)
        self._written = np.zeros((batch, 2, 0, 3))
        self._cache = np.zeros((batch, 2, self.capacity, 3))

    def step(self, input_ids, new_lengths=None, *, want_cache=False) -> Step:
        """See `Session.step`. Padding rows hold NaN: they must never be looked at."""
        batch, width = input_ids.shape
        self.fed.append(input_ids.copy())
        logits = np.full((batch, width, self.vocabulary), np.nan)
        keys = np.full((batch, 2, width, 3), np.nan)
        for b in range(batch):
            for s in range(int(new_lengths[b])):
                t = int(self.lengths[b]) + s
                logits[b, s], keys[b, :, s] = self.logit_table[t], self.key_table[t]
                self.edit(t, logits[b, s])
                self.edit_key(t, keys[b, :, s])
                self._cache[b, :, t] = keys[b, :, s]
        self.lengths = self.lengths + new_lengths
        return Step(logits, (keys,), (keys.copy(),))

    def cache(self):
        """See `Session.cache`. NaN beyond the lengths."""
        cache = self._cache.copy()
        for b, length in enumerate(self.lengths):
            cache[b, :, length:] = np.nan
        return [(cache, cache.copy())]


def scripted_verdict(bundle: Scripted, *, eager: Scripted | None = None) -> tuple[Verdict, Scripted]:
    """Judge a scripted bundle against the unedited script; the baseline's noise is 1e-6."""
    reference, eager = Scripted(), eager or Scripted(noise=1e-6)
    plan = plan_cases(reference.spec, 128, steps=STEPS)
    return verdict_of(run_cases(Sessions(reference, eager, bundle), plan), plan), reference
