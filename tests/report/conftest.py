"""Verdicts on a scripted decoder, good and bad; a tiny Llama and its bundle."""

from __future__ import annotations

import numpy as np
import pytest
import two_layers
from compare.conftest import Scripted, scripted_verdict

bundle, checkpoint = two_layers.bundle, two_layers.checkpoint


def wrong(t, logits):
    if t == 60:
        logits[7] = np.nan


def wrong_key(t, key):
    if t == 50:
        key[1, 2] += 0.5


@pytest.fixture(scope="session")
def good():
    return scripted_verdict(Scripted(noise=1e-6))[0]


@pytest.fixture(scope="session")
def bad():
    """Not finite from token 60 on, in logits; a key wrong at token 50."""
    return scripted_verdict(Scripted(wrong, wrong_key))[0]
