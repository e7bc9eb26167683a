"""Quantized caches on targets `ort`, `onnx` and `portable`: what the graph computes is the rule in fp64, and everything
that runs a bundle holds the codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import kv_bundles
import numpy as np
import onnx
import pytest
import torch
from gqa_models import write_tiny
from refusal import refused
from small_text import byte_tokenizer

import gqa_export as gqa
from gqa_export.bundle.manifest import MANIFEST, MODEL, Manifest, read_manifest
from gqa_export.cli.golden import write_golden
from gqa_export.compare.code_share import FLOOR, allowed
from gqa_export.errors import InvalidBundle, UnsupportedModel
from gqa_export.files.sha256 import file_sha256
from gqa_export.quantized.kv_codes import TIE
from gqa_export.runtime.quantized_cache import QuantizedLayer, rounded
from gqa_export.runtime.torch_session import TorchSession
from gqa_export.spec import KvCache, KvScales
from gqa_export.validation.session_runner import garbage
from gqa_export.validation.sessions import tie_of

pytestmark = pytest.mark.whole_model
MODELS = {"llama": {}, "gpt_oss": {}}
"""plain grouped-query attention; a window and sinks"""


text, checkpoints, bundles = kv_bundles.text, kv_bundles.checkpoints, kv_bundles.bundles_of()


def change(bundle: gqa.Bundle, folder: Path, edit) -> Path:
    """A copy whose graph was changed."""
    import shutil

    shutil.copytree(bundle.folder, folder)
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    edit(model.graph)
    onnx.save(model, str(folder / MODEL))
    data = json.loads((folder / MANIFEST).read_text())
    data["files"][MODEL] |= {"size": (folder / MODEL).stat().st_size, "sha256": file_sha256(folder / MODEL)}
    (folder / MANIFEST).write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(("target", "name", "codes", "cache"), [
    ("ort", "llama", "int8", "growing"), ("ort", "llama", "int4", "static"), ("ort", "gpt_oss", "int8", "static"),
    ("ort", "gpt_oss", "int4", "growing"), ("onnx", "llama", "int8", "growing"), ("onnx", "llama", "int8", "static"),
    ("onnx", "gpt_oss", "int8", "static"), ("portable", "gpt_oss", "int8", "growing"),
    ("portable", "llama", "int8", "static")])
def test_a_bundle_computes_the_rule_and_holds_equal_codes(target, name, codes, cache, bundles, checkpoints):
    bundle = bundles(name, codes, cache=cache, target=target)
    verdict = bundle.validate(checkpoints(name), steps=4).check()
    assert {"new keys and values", "cache", "best tokens"} <= set(verdict.compared)
    kv = bundle.manifest.kv_cache
    assert (kv.bits, len(kv.scales)) == (int(codes[3:]), 2)
    for case in verdict.cases:
        for kind in case.kinds:
            if kind.kind in ("keys", "values", "cache"):  # a code more or less is a thousand times as much
                assert kind.max_abs < 1e-5
                assert kind.bound < 0.05 * min(each.key for each in kv.scales)


@pytest.mark.parametrize("target", ["ort", "onnx", "portable"])
def test_fp16_may_round_to_either_neighbour_and_no_farther(target, checkpoints, bundles):
    verdict = bundles("llama", "int8", dtype="fp16", target=target).validate(checkpoints("llama"), steps=3).check()
    shares = [kind for case in verdict.cases for kind in case.kinds if kind.kind == "codes"]
    assert shares
    # PyTorch's fp16 on the same cache moves as many codes; those of half of all would be wrong ones
    assert max(kind.max_abs for kind in shares) < 0.1


def truncated(values, scale, helper):
    """Nodes that let the codes of values be cut off, not rounded."""
    return [helper.make_node("Div", [values, scale], [f"{values}.cut.steps"]),
            helper.make_node("Floor", [f"{values}.cut.steps"], [f"{values}.cut.whole"]),
            helper.make_node("Mul", [f"{values}.cut.whole", scale], [f"{values}.cut"])]


def stretched(values, scale, helper):
    """Nodes that let values be larger by 2.5 % than their codes say."""
    factor = onnx.numpy_helper.from_array(np.array(1.025, np.float32))
    return [helper.make_node("Constant", [], [f"{values}.factor"], value=factor),
            helper.make_node("Mul", [values, f"{values}.factor"], [f"{values}.cut"])]


@pytest.mark.parametrize("wrong", [truncated, stretched])
def test_fp16_codes_that_are_next_to_the_right_ones_are_not_followed_in_number(wrong, checkpoints, bundles, tmp_path):
    """Codes are off by one, or by 3 at most, which fp16 allows to each: half of them and more are, of a right bundle
    one in 50."""
    def put(graph):
        nodes = []
        for node in graph.node:
            if node.op_type == "QuantizeLinear":
                nodes += wrong(node.input[0], node.input[1], onnx.helper)
                node.input[0] = f"{node.input[0]}.cut"
            nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)

    bundle = bundles("llama", "int8", dtype="fp16", target="onnx")
    verdict = gqa.open_bundle(change(bundle, tmp_path / "b", put)).validate(checkpoints("llama"), steps=3)
    assert not verdict.passed
    codes = [kind for case in verdict.cases for kind in case.kinds if kind.kind == "codes"]
    assert all(not kind.passed for kind in codes)
    assert "of the codes of the cache are not those nearest" in verdict.failure


@pytest.mark.parametrize(("target", "cache", "writer"), [
    ("onnx", "growing", "GatherND"), ("onnx", "static", "TensorScatter"),
    ("portable", "static", "GroupedQueryAttention")])
def test_codes_are_written_as_they_are_and_new_tokens_quantized_once(target, cache, writer, bundles):
    graph = onnx.load(str(bundles(target=target, cache=cache).folder / MODEL), load_external_data=False).graph
    made = {name: node for node in graph.node for name in node.output}
    for fact in graph.output[1:]:
        assert fact.type.tensor_type.elem_type == onnx.TensorProto.INT8
        assert made[fact.name].op_type == writer
    ops = [node.op_type for node in graph.node]
    assert ops.count("QuantizeLinear") == 4  # keys and values of two layers
    assert ops.count("DequantizeLinear") == (4 if target == "onnx" else 0)


def test_the_cache_of_every_target_is_a_quarter_and_its_codes_are_the_same(bundles):
    ids, found = np.array([[5, 6, 7, 8, 9, 10]]), {}
    for target, cache in (("ort", "growing"), ("onnx", "growing"), ("onnx", "static"), ("portable", "static")):
        bundle = bundles(target=target, cache=cache)
        facts = [fact for fact in bundle.manifest.inputs if "key" in fact.name or "value" in fact.name]
        assert {fact.dtype for fact in facts} == {"int8"}
        session = bundle.session()
        session.step(ids[:, :4])
        session.step(ids[:, 4:])
        found[target, cache] = [array[:, :, :6] / np.float32(scale) for scales, pair in zip(
            bundle.manifest.kv_cache.scales, session.inner.cache(), strict=True)
            for scale, array in zip((scales.key, scales.value), pair, strict=True)]
    first = found.pop(("ort", "growing"))
    for codes in found.values():
        for one, other in zip(first, codes, strict=True):  # no number of these lies at the middle between two codes
            assert np.array_equal(np.rint(one), np.rint(other))


def test_the_cache_takes_a_quarter_and_an_eighth_of_the_bytes(bundles):
    for codes, dtype, width in (("int8", "int8", 16), ("int4", "uint8", 8)):
        manifest = bundles("llama", codes).manifest
        facts = [fact for fact in (*manifest.inputs, *manifest.outputs) if "key" in fact.name or "value" in fact.name]
        assert len(facts) == 8
        assert {(fact.dtype, fact.shape[3]) for fact in facts} == {(dtype, width)}
    costs = {codes: gqa.inspect(bundles("llama", codes).folder).costs[0].bytes for codes in ("int8", "int4")}
    layers = bundles().manifest.spec.layers
    numbers = sum(layer.kv_num_heads * (layer.head_size + layer.value_head_size) for layer in layers)
    assert costs == {"int8": numbers, "int4": numbers / 2}


def test_sessions_give_numbers_and_generation_runs(bundles, checkpoints):
    bundle = bundles("llama", "int4", cache="static")
    session = bundle.session()
    session.step(np.array([[5, 6, 7]]))
    [key, *_] = (pair[0] for pair in session.inner.cache())
    scale = np.float32(bundle.manifest.kv_cache.scales[0].key)
    codes = key[:, :, :3] / scale
    assert np.abs(codes - np.rint(codes)).max() < 1e-4
    assert np.abs(codes).max() > 2
    assert len(bundle.complete(token_ids=[5, 6, 7], max_new_tokens=4).tokens) == 4
    assert bundle.benchmark(prompt_tokens=4, new_tokens=3, repeat=1).decode_tokens_per_s > 0


@pytest.mark.parametrize(("target", "codes"), [
    ("trt-native", "int8"), ("trt-plugin", "int4"), ("onnx", "int4"), ("portable", "int4")])
def test_targets_without_it_refuse_by_name(target, codes, checkpoints, text, tmp_path):
    with refused("E-TARGET-KV", UnsupportedModel) as found:
        gqa.export(checkpoints("llama"), tmp_path / "b", target=target, kv_cache=codes, calibrate=text, capacity=64)
    assert target in found.error.what
    assert target != "trt-native" or "trt-plugin" in found.error.what
    assert target not in ("onnx", "portable") or "--target ort or --kv-cache int8" in found.error.fix
    assert not (tmp_path / "b").exists()


def test_scales_are_not_guessed(checkpoints, tmp_path):
    with refused("E-OPTION-CALIBRATE"):
        gqa.export(checkpoints("llama"), tmp_path / "b", kv_cache="int8", capacity=64)
    (tmp_path / "short.txt").write_text("Too short.")
    with refused("E-FILE-TEXT-SHORT"):
        gqa.export(checkpoints("llama"), tmp_path / "b", kv_cache="int8", capacity=64,
                   calibrate=tmp_path / "short.txt")


def test_a_layer_that_the_operator_cannot_hold_keeps_codes_of_8_bits_and_is_refused_with_4(text, tmp_path):
    odd = write_tiny("llama", tmp_path / "odd", num_hidden_layers=2, head_dim=12)
    byte_tokenizer(odd)
    with refused("E-TARGET-KV", UnsupportedModel) as found:
        gqa.export(odd, tmp_path / "b", kv_cache="int4", calibrate=text, capacity=64)
    assert "layers 0-1" in found.error.where
    assert "int8" in found.error.fix
    bundle = gqa.export(odd, tmp_path / "b", kv_cache="int8", calibrate=text, capacity=64)
    assert [fallback.layer for fallback in bundle.manifest.fallbacks] == [0, 1]
    bundle.validate(odd, steps=2).check()


@pytest.mark.parametrize("target", ["ort", "onnx", "portable"])
def test_bisect_refuses_codes_by_name(target, bundles, checkpoints, program):
    done = program("bisect", bundles(target=target).folder, "--against", checkpoints("llama"))
    assert done.returncode == 2
    assert "E-VALIDATE-BISECT-CODES" in done.stderr
    assert "--kv-cache" in done.stderr


def test_files_for_polygraphy_are_not_written_for_codes(bundles, checkpoints, tmp_path):
    with refused("E-OPTION-POLYGRAPHY"):
        write_golden(bundles().folder, str(checkpoints("llama")), tmp_path / "golden")
    assert not (tmp_path / "golden").exists()


def exchange_in_the_operator(graph):
    node = next(node for node in graph.node if node.op_type == "GroupQueryAttention")
    node.input[12], node.input[13] = node.input[13], node.input[12]


def exchange_in_the_nodes_around(graph):
    for op in ("QuantizeLinear", "DequantizeLinear"):
        key, value = [node for node in graph.node if node.op_type == op and "layers.0." in node.name] or [None, None]
        if key:
            key.input[1], value.input[1] = value.input[1], key.input[1]


@pytest.mark.parametrize(("target", "exchange"), [
    ("ort", exchange_in_the_operator), ("onnx", exchange_in_the_nodes_around),
    ("portable", exchange_in_the_nodes_around)])
def test_exchanged_scales_are_caught(target, exchange, bundles, checkpoints, tmp_path):
    broken = change(bundles(target=target), tmp_path / "b", exchange)
    verdict = gqa.open_bundle(broken).validate(checkpoints("llama"), steps=2)
    assert not verdict.passed
    assert verdict.first.output == "layer 0 key"


def test_a_call_whose_scale_is_without_that_of_its_codes_contradicts_its_manifest(bundles, checkpoints, tmp_path):
    def forget(graph):
        node = next(node for node in graph.node if node.op_type == "GroupedQueryAttention")
        scale = next(attribute for attribute in node.attribute if attribute.name == "scale")
        scale.f = 16 ** -0.5

    bundle = bundles(target="portable")
    assert bundle.manifest.spec.layers[0].scale == 16 ** -0.5
    with refused("E-BUNDLE-CLAIM", InvalidBundle):
        gqa.open_bundle(change(bundle, tmp_path / "b", forget)).validate(checkpoints("llama"), steps=2)


def test_a_manifest_whose_scales_are_not_the_layers_is_refused(bundles):
    manifest = bundles().manifest
    wrong = replace(manifest, kv_cache=replace(manifest.kv_cache, scales=manifest.kv_cache.scales[:1]))
    with refused("E-BUNDLE-MANIFEST", InvalidBundle):
        Manifest.from_json(wrong.to_json())
    plain = replace(manifest, kv_cache=None)
    with refused("E-BUNDLE-MANIFEST", InvalidBundle):
        Manifest.from_json(plain.to_json())


def test_the_reference_rounds_as_the_rule_does_and_follows_only_at_a_tie():
    scale, low = 0.5, torch.tensor([[[0.2499, 0.25001, 5.0, 100.0]]], dtype=torch.float64)
    own = rounded(low, scale, 8, 1e-3, None)
    assert own.tolist() == [[[0.0, 0.5, 5.0, 63.5]]]
    theirs = np.array([[[0.5, 0.0, 5.5, 63.5]]])
    assert rounded(low, scale, 8, 1e-3, theirs).tolist() == [[[0.5, 0.0, 5.0, 63.5]]]
    assert rounded(low, scale, 8, 0.0, theirs).tolist() == own.tolist()


def test_codes_of_fp8_count_in_their_own_units_and_zero_has_the_least():
    """Between 64 and 128 the distance is 8, around zero 2^-9. Codes have 16 units at most, not 127."""
    numbers = torch.tensor([[[68.1, 67.9, 0.0, 2.0**-9 * 0.4]]], dtype=torch.float64)
    assert rounded(numbers, 1.0, 8, TIE, None, True).tolist() == [[[72.0, 64.0, 0.0, 0.0]]]
    others = np.array([[[64.0, 80.0, 2.0**-5, 2.0**-9]]])
    assert rounded(numbers, 1.0, 8, 0.1, others, True).tolist() == [[[64.0, 64.0, 0.0, 2.0**-9]]]
    coded = KvCache(8, (), "", 0, "fp8")
    assert tie_of(coded, "float16") == 16 * 4 * 2.0**-10
    assert tie_of(coded, "bfloat16") < 0.5


def test_small_codes_of_fp8_are_ties_by_what_rounding_does_to_the_largest():
    """fp32: 32 units in the last place of 512 are 2e-3: nothing beside the middle of 16 and 18, a 60th of the distance
    of codes around 1, and all that is allowed at the least, which lie 2e-3 apart."""
    part = tie_of(KvCache(8, (), "", 0, "fp8"), "float32")
    numbers = torch.tensor([17.003, 1.0635, 1.066, 2.0**-9 * 8.1, 2.0**-9 * 8.04], dtype=torch.float64)[None, None]
    others = np.array([[[16.0, 1.0, 1.0, 2.0**-9 * 9, 2.0**-9 * 9]]])
    assert rounded(numbers, 1.0, 8, part, others, True)[0, 0].tolist() == [
        18.0, 1.0, 1.125, 2.0**-9 * 9, 2.0**-9 * 8]


def test_a_tie_is_never_half_of_the_distance_and_in_fp32_what_it_was():
    for bits in (8, 4):
        kv = KvCache(bits, (), "", 0)
        assert tie_of(kv, "float32") == TIE
        assert all(tie_of(kv, dtype) < 0.5 for dtype in ("float16", "bfloat16"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_that_are_others_are_told_by_number_from_those_that_rounding_moves(dtype):
    """Two draws of the errors of a format, a unit in the last place, and a code that is cut off or 5 % too large."""
    exact = torch.from_numpy(np.random.default_rng(5).normal(0, 30, (1, 500, 16)).clip(-127, 127))
    random, unit = torch.Generator().manual_seed(6), torch.finfo(dtype).eps
    layer = QuantizedLayer(KvScales(0, 1.0, 1.0), KvCache(8, (), "", 0), 0.45)
    layer.followed = (exact.numpy(), exact.numpy())
    layer.update(exact[None], exact[None])

    def share(codes):
        apart, total = layer.apart((codes.numpy(), codes.numpy()))
        return apart / total

    def drawn(factor=1.0):
        return exact * factor + 30 * unit * torch.randn(exact.shape, generator=random, dtype=torch.float64)

    own = share(torch.round(drawn()))
    assert 0 < share(torch.round(drawn())) < allowed(own)
    assert share(torch.floor(drawn())) > allowed(own)
    assert share(torch.round(drawn(1.05))) > allowed(own)
    assert share(torch.from_numpy(layer.own()[0])) == 0


def test_not_all_codes_may_be_others_however_many_pytorch_moves():
    assert allowed(0.0) == FLOOR
    assert allowed(0.1) == 0.2
    assert all(allowed(own) < 1 for own in (0.4, 0.9))


def test_garbage_of_codes_is_the_largest_and_the_least():
    assert garbage((1e4, float("nan")), np.dtype(np.int8)).tolist() == [127, -128]
    assert garbage((1e4,), np.dtype(np.float32)).tolist() == [1e4]


def test_the_loss_is_against_a_cache_of_numbers(bundles, checkpoints, text):
    int8, int4 = (bundles("llama", codes).validate(checkpoints("llama"), steps=2, reference=checkpoints("llama"),
                                                   text=text).loss for codes in ("int8", "int4"))
    assert 0 < int8.kl_mean < int4.kl_mean
    assert int8.kl_mean > 1e-7


def test_what_the_export_records_is_what_a_run_measures(bundles, checkpoints, text):
    kv = bundles().manifest.kv_cache
    session = TorchSession(gqa_model(checkpoints("llama")), 64)
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(checkpoints("llama") / "tokenizer.json")).encode(text.read_text()).ids
    assert kv.tokens == len(ids)
    found = []
    for start in range(0, len(ids), 64):
        session.reset(1)
        session.step(np.array([ids[start: start + 64]]))
        found.append(session.cache()[1][0].ravel())
    keys = np.concatenate(found)
    codes = np.rint(keys / np.float32(kv.scales[1].key))
    clipped = (codes > 127) | (codes < -128)
    assert clipped.mean() == pytest.approx(kv.scales[1].key_clip, abs=1e-6)
    assert kv.scales[1].key == pytest.approx(np.abs(keys).max() / 127, rel=0.7)


def gqa_model(checkpoint):
    from gqa_export.checkpoint.load_model import load_model
    from gqa_export.checkpoint.open import open_checkpoint

    return load_model(open_checkpoint(checkpoint), "float32")


def test_the_manifest_is_read_back(bundles):
    manifest = bundles().manifest
    assert read_manifest(bundles().folder).kv_cache == manifest.kv_cache
    assert "genai_config.json" not in manifest.files
