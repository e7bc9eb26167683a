"""A slice of the matrix that meets every mechanism: the same check that made the table, on one target or two."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
from evidence.architecture_check import REFUSED, SUPPORTED, check
from gqa_models.shrink import write_small

import gqa_export as gqa
from gqa_export.bundle.manifest import MANIFEST, MODEL, FileFact
from gqa_export.describe.architectures import known_names
from gqa_export.errors import EXIT_DIFFERENT
from gqa_export.files.sha256 import file_sha256
from gqa_export.validation.validate import validate

pytestmark = pytest.mark.whole_model

# What each is here for: patched forward (BERT's shape, BART's, Falcon, RoFormer), patched `_attn` with a window of its
# own, a table of attention classes, positions from padding, from a cache's length, latent attention (D != E), experts,
# heads that share one key, partial and interleaved rotary, a window in the mask alone, softcap, sinks, ALiBi, experts
# in a loop, differential attention, the language model of a multimodal model, layers with states or with nothing,
# attention in chunks and temperatures by position.
SUPPORTED_SLICE = ("bert", "rembert", "trocr", "falcon", "roformer", "gpt_neo", "codegen", "roberta", "bart",
                   "deepseek_v3", "qwen3_moe", "gpt_bigcode", "glm", "phimoe", "vaultgemma", "gpt_oss", "bloom",
                   "dbrx", "diffllama", "gemma3", "nemotron_h", "mamba", "kimi_linear", "llama4_text")
REFUSED_SLICE = {
    "recurrent_gemma": "linear_attention", "zamba": "share one state", "qwen4_exp_text": "`layers`",
    "deepseek_v32": "`indices`", "cpmant": "attention interface", "doge": "mask",
    "prophetnet": "cross-attention", "minimax": "linear_attention", "inkling_text": "`position_bias`",
    "hrm_text": "more than once", "xlnet": "attention interface",
}


@pytest.mark.parametrize("name", SUPPORTED_SLICE)
def test_an_architecture_is_exported_and_equals_pytorch(name, tmp_path):
    row = check(name, known_names()[name], write_small(name, tmp_path / name), targets=("ort",),
                caches=("growing",), depth=False)
    assert row.verdict == SUPPORTED, row.reason


def test_an_epsilon_of_1e_8_stays_in_the_graph_and_its_loss_would_be_seen(tmp_path):
    """Helium's own value. It was once removed as if it were 0, and at the usual size of a random embedding no
    comparison saw that: rows of the embedding are small enough now for an epsilon to decide what a norm makes of them.
    """
    folder = write_small("helium", tmp_path / "helium")
    row = check("helium", known_names()["helium"], folder, targets=("ort", "portable"), caches=("growing",),
                depth=False)
    assert row.verdict == SUPPORTED, row.reason
    bundle = gqa.export(folder, tmp_path / "bundle")
    graph = onnx.load(str(bundle.folder / MODEL), load_external_data=False).graph
    epsilons = [attribute.f for node in graph.node for attribute in node.attribute if attribute.name == "epsilon"]
    norms = 2 * len(bundle.manifest.spec.layers) + 1
    assert epsilons == pytest.approx([1e-8] * norms, rel=1e-6)  # an fp32 attribute
    model = onnx.load(str(bundle.folder / MODEL), load_external_data=False)
    next(attribute for node in model.graph.node for attribute in node.attribute if attribute.name == "epsilon").f = 0.0
    (bundle.folder / MODEL).write_bytes(model.SerializeToString())
    fact = FileFact((bundle.folder / MODEL).stat().st_size, file_sha256(bundle.folder / MODEL))
    manifest = replace(bundle.manifest, files={**bundle.manifest.files, MODEL: fact})
    (bundle.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    assert validate(bundle.folder, folder, steps=2, provider="cpu", check_hashes=False).exit_code == EXIT_DIFFERENT


@pytest.mark.parametrize(("name", "word"), REFUSED_SLICE.items())
def test_an_architecture_that_cannot_be_held_is_refused_with_the_reason(name, word, tmp_path):
    row = check(name, known_names()[name], write_small(name, tmp_path / name), depth=False)
    assert row.verdict == REFUSED, row
    assert word in row.reason
