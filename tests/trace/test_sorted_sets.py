"""Is a graph the same whatever seed strings are hashed with, though models go through their layer types as sets?"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gqa_models.shrink import small_config

from gqa_export.trace.patches import registry

KINDS = ["sliding_attention", "full_attention"]
PROGRAM = "import test_sorted_sets as here; print(list(set(here.KINDS))); print(here.digest())"


def digest() -> str:
    """The start of the sha256 of a trace of Gemma 4, whose kinds of layers have rotary tables of their own: the model
    keeps a set of them from when it is built, and goes through it in each call."""
    from gqa_export.trace.tracing import trace

    config = small_config("gemma4_text", num_hidden_layers=2, layer_types=KINDS, num_kv_shared_layers=0)
    traced = trace(config, dtype="float32", cache="growing", capacity=64, interface="lengths", stamping=False)
    return hashlib.sha256(traced.model.SerializeToString(deterministic=True)).hexdigest()[:16]


@pytest.mark.whole_model
def test_a_trace_does_not_depend_on_the_seed_that_strings_are_hashed_with():
    """The other process hashes with the one of two seeds that orders the layer types unlike this process."""
    ours = list(set(KINDS))
    seed = "0" if ours == KINDS else "1"
    found = subprocess.run([sys.executable, "-c", PROGRAM], cwd=Path(__file__).parent, capture_output=True, text=True,
                           env={**os.environ, "PYTHONHASHSEED": seed}, timeout=120)
    assert found.returncode == 0, found.stderr
    order, theirs = found.stdout.splitlines()
    assert order == str(ours[::-1]), "the seeds are chosen for CPython's hash of strings: choose others"
    assert theirs == digest()


def test_a_set_that_a_model_makes_is_a_set_in_the_order_of_text_while_it_is_traced_and_never_else():
    from transformers.models.gemma3 import modeling_gemma3 as module

    words = [f"word {place}" for place in range(40)]
    with registry.applied(small_config("gemma3_text")), registry.applied(small_config("gemma3_text")):
        made = module.set(words[::-1])
        assert list(made) == sorted(words)
        made.add("a word")  # what is iterated is what it holds, whatever was done to it
        made.discard("word 7")
        assert list(made) == sorted({"a word", *words} - {"word 7"})
        assert made == {"a word", *words} - {"word 7"}
        assert isinstance(made, set)
        assert isinstance(set(words), module.set), "a model asks this of sets that it did not make"
        assert not isinstance(words, module.set)
    assert not hasattr(module, "set")
