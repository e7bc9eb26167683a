"""The bisector: nothing is found in good bundles, and every broken layer and op is named, with words that fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from evidence.mutations.kinds import MUTATIONS
from evidence.mutations.mutation import Mutation, NotHere, break_bundle
from evidence.mutations.of_quantized import MUTATIONS as OF_CODES
from gqa_models import write_tiny
from refusal import refused

from gqa_export.bisect.bisection import END, bisect
from gqa_export.bisect.known_faults import attend, rounding_words
from gqa_export.bisect.match_tensors import Place, agreed, find, relative
from gqa_export.bisect.torch_layers import Attended
from gqa_export.bundle.manifest import MODEL
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx

pytestmark = pytest.mark.whole_model

SAMPLES = (("llama", "ort"), ("mistral", "ort"), ("gemma2", "ort"), ("gpt_oss", "ort"), ("qwen3", "ort"),
           ("llama", "portable"), ("mistral", "onnx"))
SINGLE = [mutation for mutation in MUTATIONS if mutation.layer >= 0 and mutation not in OF_CODES]
"""damage to codes needs quantized samples; `validate` finds it: tests/evidence, docs/benchmarks/mutations.json"""


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """(name, target) -> (bundle, checkpoint), made once."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}
    written: dict[str, Path] = {}

    def get(name: str, target: str) -> tuple[Path, Path]:
        if (name, target) not in made:
            if name not in written:
                written[name] = write_tiny(name, tmp_path_factory.mktemp(name))
            bundle = tmp_path_factory.mktemp("b") / "bundle"
            export_onnx(written[name], bundle, ExportOptions(target=target, capacity=128, dtype="fp32"))
            made[name, target] = bundle, written[name]
        return made[name, target]

    return get


def broken(samples, mutation: Mutation, folder: Path) -> tuple[Path, Path]:
    """The first sample that has what the mutation breaks, broken."""
    for name, target in SAMPLES:
        bundle, checkpoint = samples(name, target)
        try:
            return break_bundle(bundle, folder / "broken", mutation.change), checkpoint
        except NotHere:
            shutil.rmtree(folder / "broken")
    raise AssertionError(f"no sample has what {mutation.name} breaks")


@pytest.mark.parametrize(("name", "target"), SAMPLES)
def test_nothing_is_found_in_a_good_bundle(samples, name, target):
    bundle, checkpoint = samples(name, target)
    found = bisect(bundle, checkpoint)
    assert found.finding is None, str(found.finding)
    assert found.exit_code == 0
    assert found.probes == ["prompt", "decode", "piece", "ragged prompt", "ragged decode", "whole cache"]


@pytest.mark.parametrize("mutation", SINGLE, ids=lambda m: m.name)
def test_the_broken_layer_and_op_are_named(samples, tmp_path, mutation):
    found = bisect(*broken(samples, mutation, tmp_path))
    assert found.finding is not None
    assert found.exit_code == 1
    assert (found.finding.layer, found.finding.op in mutation.ops) == (mutation.layer, True), str(found.finding)
    assert mutation.words in found.finding.words
    assert found.finding.max_abs > found.finding.bound


@pytest.mark.parametrize("name", ["stale tail", "past one short"])
def test_what_breaks_every_layer_is_found_in_the_first(samples, tmp_path, name):
    mutation = next(m for m in MUTATIONS if m.name == name)
    found = bisect(*broken(samples, mutation, tmp_path))
    assert found.finding.layer == 0
    assert found.finding.op.startswith("self_attn")
    assert found.finding.probe in ("decode", "piece", "ragged prompt", "ragged decode")


def test_a_wrong_last_matrix_is_after_the_layers(samples, tmp_path):
    found = bisect(*broken(samples, next(m for m in MUTATIONS if m.name == "head row"), tmp_path))
    assert found.finding.op == END


def test_the_command_says_layer_op_and_pattern_and_exits_with_1(samples, tmp_path, program):
    mutation = next(m for m in MUTATIONS if m.name == "window longer")
    bundle, checkpoint = broken(samples, mutation, tmp_path)
    done = program("bisect", bundle, "--against", checkpoint)
    assert done.returncode == 1, done.stderr
    assert "layer 1, self_attn.attention" in done.stdout
    assert "a window of 17 instead of 16 (wrong mask)" in done.stdout


def test_a_graph_without_module_scopes_is_refused(samples, tmp_path):
    import onnx
    from evidence.mutations.mutation import sign

    from gqa_export.bundle.manifest import read_manifest

    bundle, checkpoint = samples("llama", "ort")
    shutil.copytree(bundle, tmp_path / "b")
    model = onnx.load(str(tmp_path / "b" / MODEL), load_external_data=False)
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"
    onnx.save(model, str(tmp_path / "b" / MODEL))
    sign(tmp_path / "b", read_manifest(tmp_path / "b"))
    with refused("E-VALIDATE-BISECT-NAMES"):
        bisect(tmp_path / "b", checkpoint)


def test_names_relative_to_their_layer_are_the_same_in_every_layer():
    name = "model.layers.2.mlp/Add_0.0"
    assert relative(name, "model.layers", 3) == "model.layers.-1.mlp/Add_0.0"
    assert relative(name, "model.layers", 2) == relative(name.replace("2", "12"), "model.layers", 12)
    assert relative("model.layers.2/x", "layers", 2) != relative("model.layers.3/x", "layers", 2)


def test_a_point_is_found_among_the_columns_of_a_joined_matrix():
    random = np.random.default_rng(1)
    joined = random.normal(size=(7, 40))
    assert find(joined[:, 16:24], {"x": joined, "y": random.normal(size=(7, 40))}) == [Place("x", 16)]
    apart = joined.reshape(7, 5, 8).swapaxes(0, 1)
    assert find(joined[:, 16:24], {"heads": apart}) == [Place("heads", 16)]


def test_the_place_that_most_layers_share_wins():
    right, other = Place("a", 0), Place("b", 0)
    assert agreed([[right], [], [right, other]]) == right
    assert agreed([[], []]) is None


def test_the_attention_of_the_hypotheses_is_attention():
    import torch

    random = np.random.default_rng(2)
    query, key, value = (random.normal(size=(heads, 5, 8)) for heads in (4, 2, 2))
    seen = np.tril(np.ones((5, 5), bool))
    got = attend(Attended(query, key, value, None, 0.3, 0.0, None), seen)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(t)[None] for t in (query, key, value)), is_causal=True, scale=0.3, enable_gqa=True)
    np.testing.assert_allclose(got.swapaxes(0, 1), expected[0].numpy(), atol=1e-12)


def test_rounding_is_recognized_and_a_common_factor_is_not_taken_for_it():
    values = np.random.default_rng(3).normal(size=(20, 64))
    assert "fp16" in rounding_words(values, values.astype(np.float16).astype(np.float64))
    assert "fp16" not in rounding_words(values, values * (1 + 2.0**-12))
