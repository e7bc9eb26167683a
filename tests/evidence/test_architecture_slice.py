"""A slice of the matrix that meets every mechanism: the same check that made the table, on one target or two."""

from __future__ import annotations

import pytest
from evidence.architecture_check import REFUSED, SUPPORTED, check
from gqa_models.shrink import write_small

from gqa_export.describe.architectures import known_names

# What each is here for: patched forward (BERT's shape, BART's, Falcon, RoFormer), patched `_attn` with a window of its
# own, a table of attention classes, positions from padding, from a cache's length, latent attention (D != E), experts,
# heads that share one key, partial and interleaved rotary, a window in the mask alone, softcap, sinks, ALiBi, experts
# in a loop, differential attention, the language model of a multimodal model.
SUPPORTED_SLICE = ("bert", "rembert", "trocr", "falcon", "roformer", "gpt_neo", "codegen", "roberta", "bart",
                   "deepseek_v3", "qwen3_moe", "gpt_bigcode", "glm", "phimoe", "vaultgemma", "gpt_oss", "bloom",
                   "dbrx", "diffllama", "gemma3")
REFUSED_SLICE = {
    "mamba": "linear_attention", "falcon_h1": "hybrid", "lfm2": "conv", "qwen3_next": "linear_attention",
    "deepseek_v32": "`indices`", "llama4_text": "chunked", "cpmant": "attention interface", "doge": "mask",
    "prophetnet": "cross-attention", "minimax": "linear_attention", "inkling_text": "hybrid",
    "hrm_text": "more than once",
}


@pytest.mark.parametrize("name", SUPPORTED_SLICE)
def test_an_architecture_is_exported_and_equals_pytorch(name, tmp_path):
    row = check(name, known_names()[name], write_small(name, tmp_path / name), targets=("ort",),
                caches=("growing",), depth=False)
    assert row.verdict == SUPPORTED, row.reason


@pytest.mark.parametrize(("name", "word"), REFUSED_SLICE.items())
def test_an_architecture_that_cannot_be_held_is_refused_with_the_reason(name, word, tmp_path):
    row = check(name, known_names()[name], write_small(name, tmp_path / name), depth=False)
    assert row.verdict == REFUSED, row
    assert word in row.reason
