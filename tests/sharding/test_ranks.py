"""Models cut over ranks: the merged graph is PyTorch's, the weights stay where they are, faults are caught."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from evidence.tensor_parallel_check import write_family
from gqa_models import save_random, write_tiny
from refusal import refused

from gqa_export.bundle.manifest import MANIFEST, MODEL, read_manifest
from gqa_export.bundle.parallel import collective_order
from gqa_export.errors import GqaExportError, InvalidBundle, UnsupportedModel
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.validation.reference import open_reference
from gqa_export.validation.validate import validate

pytestmark = pytest.mark.whole_model


def exported(checkpoint, folder, ranks=2, **options):
    values = {"target": "trt-native", "capacity": 48, "weights": "link", **options}
    export_onnx(checkpoint, folder, ExportOptions(tensor_parallel=ranks, **values))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("llama") / "ck", num_hidden_layers=2, num_attention_heads=8,
                      head_dim=8)


@pytest.fixture(scope="module")
def bundle(llama, tmp_path_factory):
    """Four ranks, two key/value heads: each is held twice."""
    return exported(llama, tmp_path_factory.mktemp("b") / "bundle", 4)


@pytest.fixture(scope="module")
def reference(llama, bundle):
    return open_reference(llama, read_manifest(bundle), "float32", [])


@pytest.mark.parametrize(("family", "ranks", "target"), [("olmo2", 3, "trt-native"), ("mixtral", 3, "trt-plugin")])
def test_a_family_cut_over_ranks_is_pytorch(family, ranks, target, tmp_path):
    """Norms over all heads, whose sum goes over the ranks, and experts. The others: the committed rows."""
    checkpoint = write_family(family, tmp_path / "ck")
    bundle = exported(checkpoint, tmp_path / "b", ranks, target=target)
    verdict = validate(bundle, checkpoint, steps=2)
    assert verdict.passed, verdict.first


def test_ranks_meet_in_one_order_after_every_contraction(bundle):
    parallel = read_manifest(bundle).parallel
    names = [each.rpartition(": ")[2].rpartition("/")[0] for each in parallel.collectives]
    assert names == [f"model.layers.{layer}.{module}/MatMul_0" for layer in range(2)
                     for module in ("self_attn.o_proj", "mlp.down_proj")] + ["lm_head/MatMul_0"]
    assert len({rank.collectives_sha256 for rank in parallel.ranks}) == 1
    assert [rank.heads[0].kv for rank in parallel.ranks] == [(0,), (0,), (1,), (1,)]
    assert [rank.heads[1].first_query for rank in parallel.ranks] == [0, 2, 4, 6]
    for rank in parallel.ranks:
        model = onnx.load(str(bundle / rank.folder / MODEL), load_external_data=False)
        assert collective_order(model) == parallel.collectives
        nodes = [node for node in model.graph.node if node.op_type == "DistCollective"]
        facts = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
        assert facts == {"collective_operation": b"all_reduce", "reduce_op": b"sum", "nb_rank": 4, "root": -1,
                         "group_size": 0, "groups": []}


def test_only_columns_are_written_and_rows_stay_in_the_checkpoint(bundle, llama):
    manifest = read_manifest(bundle)
    total = sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    written = sum(fact.size for name, fact in manifest.files.items() if name.endswith(".data"))
    assert written == manifest.bytes_copied
    assert written / total < 0.36
    for rank in manifest.parallel.ranks:
        graph = onnx.load(str(bundle / rank.folder / MODEL), load_external_data=False).graph
        copied = {tensor.name for tensor in graph.initializer for entry in tensor.external_data
                  if entry.key == "location" and entry.value.endswith(".data")}
        assert copied == {f"model.layers.{layer}.{name}.weight" for layer in range(2)
                          for name in ("self_attn.o_proj", "mlp.down_proj")}


def test_the_merged_graph_passes_and_says_what_was_not_run(bundle, llama, reference):
    verdict = validate(bundle, llama, steps=3, reference=reference)
    assert verdict.passed, verdict.first
    assert any("no transport" in note for note in verdict.notes)


def test_a_narrow_failure_is_measured_again_as_of_any_bundle(bundle, llama, reference, monkeypatch):
    """PyTorch's session has the heads of all ranks, and draws its rounding errors again all the same."""
    monkeypatch.setattr("gqa_export.validation.run_cases.doubtful", lambda *_: True)
    verdict = validate(bundle, llama, steps=1, reference=reference)
    assert verdict.passed, verdict.first
    assert any("measured 4 times" in note for note in verdict.notes)


def lost_summand(model):
    node = [node for node in model.graph.node if node.op_type == "Sum"][4]
    node.input.pop()


def exchanged_shards(model):
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    one, other = (tensors[f"rank{rank}/model.layers.0.self_attn.o_proj.weight"] for rank in (0, 2))
    for mine, theirs in zip(one.external_data, other.external_data):
        mine.value, theirs.value = theirs.value, mine.value


def wrong_head(model):
    """Rank 1 takes the keys of rank 2's head: a replica that no other rank would notice."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    one, other = (tensors[f"rank{rank}/model.layers.1.self_attn.k_proj.weight"] for rank in (1, 2))
    one.external_data[1].value = other.external_data[1].value


def exchanged_pasts(model):
    node = next(node for node in model.graph.node if node.name == "merged/past_key_values.0.key")
    node.output[1], node.output[2] = node.output[2], node.output[1]


def missing_gather(model):
    """Rank 3 has its own rows of the vocabulary four times instead of everybody's."""
    node = next(node for node in model.graph.node if node.name == "rank3/lm_head/MatMul_0/all_gather")
    for place in range(4):
        node.input[place] = node.input[3]


def not_a_number(model):
    """One entry of one rank's weight is NaN: it hides in a maximum."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("val_30"))
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(np.nan, np.float32), tensor.name))


@pytest.mark.parametrize("fault", [lost_summand, exchanged_shards, wrong_head, exchanged_pasts, missing_gather,
                                   not_a_number], ids=lambda fault: fault.__name__)
def test_a_fault_of_one_rank_is_caught(fault, bundle, llama, reference, monkeypatch):
    from gqa_export.validation import ranks

    def merged(folder, manifest):
        model = original(folder, manifest)
        before = model.SerializeToString(deterministic=True)
        fault(model)
        assert model.SerializeToString(deterministic=True) != before
        return model

    original = ranks.merge
    monkeypatch.setattr(ranks, "merge", merged)
    assert not validate(bundle, llama, steps=2, reference=reference).passed


def test_a_rank_that_lacks_a_collective_is_refused_before_anything_runs(bundle, llama, tmp_path):
    import shutil

    copy = shutil.copytree(bundle, tmp_path / "copy", copy_function=shutil.copy2)
    model = onnx.load(str(copy / "rank2" / MODEL), load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "DistCollective")
    node.op_type = "Identity"
    del node.attribute[:]
    onnx.save(model, str(copy / "rank2" / MODEL))
    data = json.loads((copy / MANIFEST).read_text())
    from gqa_export.files.sha256 import file_sha256

    data["files"]["rank2/model.onnx"].update(sha256=file_sha256(copy / "rank2" / MODEL),
                                            size=(copy / "rank2" / MODEL).stat().st_size)
    (copy / MANIFEST).write_text(json.dumps(data))
    with refused("E-BUNDLE-COLLECTIVES", InvalidBundle) as found:
        validate(copy, llama)
    assert "rank 2" in found.error.what


def test_one_rank_is_the_bundle_of_today_byte_for_byte(llama, tmp_path):
    for folder, options in (("plain", {}), ("one", {"tensor_parallel": 1})):
        export_onnx(llama, tmp_path / folder, ExportOptions(target="trt-plugin", capacity=48, **options))
    files = [{path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("plain", "one")]
    assert files[0] == files[1]
    assert b"parallel" not in files[0][MANIFEST]


def weights_of(folder: Path) -> dict[str, bytes]:
    """The bytes of a rank's weights, by name."""
    found = {}
    for tensor in onnx.load(str(folder / MODEL), load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            with open(folder / place["location"], "rb") as file:
                file.seek(int(place["offset"]))
                found[tensor.name] = file.read(int(place["length"]))
    return found


def test_copied_and_linked_ranks_hold_the_same_weights(bundle, llama, tmp_path):
    copied = exported(llama, tmp_path / "copied", 4, weights="copy")
    for rank in range(4):
        assert weights_of(bundle / f"rank{rank}") == weights_of(copied / f"rank{rank}")


def test_ranks_that_do_not_divide_the_heads_are_refused_with_the_layer(llama, tmp_path):
    with refused("E-MODEL-SHARD-HEADS", UnsupportedModel) as found:
        exported(llama, tmp_path / "b", 3)
    assert "layer 0" in found.error.where
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("options", [{"target": "ort"}, {"target": "portable"}, {"weights": "inplace"}])
def test_ranks_are_for_tensorrt_and_folders_of_their_own(options, llama, tmp_path):
    with refused("E-OPTION-TENSOR-PARALLEL", GqaExportError):
        exported(llama, llama if "weights" in options else tmp_path / "b", 2, **options)


def test_a_plan_that_disagrees_with_transformers_is_refused(llama, tmp_path, monkeypatch):
    from gqa_export.exporting import prepare

    monkeypatch.setattr(prepare, "tensor_parallel_plan", lambda checkpoint: {"layers.*.mlp.up_proj": "rowwise"})
    with refused("E-MODEL-SHARD-PLAN", UnsupportedModel) as found:
        exported(llama, tmp_path / "b")
    assert "up_proj rowwise, here it is colwise" in found.error.what


def test_a_vocabulary_that_does_not_divide_is_gathered_without_its_overlap(tmp_path):
    checkpoint = write_tiny("llama_tied", tmp_path / "ck", vocab_size=317, num_hidden_layers=1)
    bundle = exported(checkpoint, tmp_path / "b", 4)
    manifest = read_manifest(bundle)
    assert manifest.parallel.vocabulary == "gathered"
    sizes = []
    for rank in range(4):
        graph = onnx.load(str(bundle / f"rank{rank}" / MODEL), load_external_data=False).graph
        sizes += [tensor.dims[0] for tensor in graph.initializer if tensor.name == "head/rows"]
    assert sizes == [80] * 4  # NCCL gathers equal counts: the last rank begins three rows earlier
    assert validate(bundle, checkpoint, steps=2).passed


def test_a_packed_matrix_of_groups_is_cut_by_its_groups(tmp_path):
    """Falcon's new decoder: each group's queries, key and value lie together, and the key is repeated for each query.
    The plugin rotates, and once read the groups as they lay there, with an axis too many."""
    import transformers

    config = transformers.AutoConfig.for_model("falcon", num_attention_heads=8, num_kv_heads=4, hidden_size=64,
                                               vocab_size=130, num_hidden_layers=1, new_decoder_architecture=True)
    checkpoint = save_random(config, tmp_path / "ck")
    bundle = exported(checkpoint, tmp_path / "b", 2, target="trt-plugin")
    verdict = validate(bundle, checkpoint, steps=2)
    assert verdict.passed, verdict.first


@pytest.mark.parametrize(("options", "code"), [({"quantize": "int4"}, "E-MODEL-QUANTIZED-RANKS"),
                                               ({"lora": ("adapter",)}, "E-TARGET-LORA")])
def test_what_ranks_do_not_hold_is_refused_by_name(options, code, llama, tmp_path):
    with refused(code, GqaExportError):
        exported(llama, tmp_path / "b", 2, weights="copy", **options)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("method", ["int4", "fp8", "rules.toml"])
def test_quantizing_for_ranks_is_refused_before_anything_is_read(method, tmp_path):
    """The fix is not `--quantize dequantize`, which is for checkpoints that hold codes."""
    with refused("E-MODEL-QUANTIZED-RANKS", UnsupportedModel) as refusal:
        exported(tmp_path / "no such checkpoint", tmp_path / "b", 2, weights="copy", quantize=method)
    assert refusal.error.fix == "leave out --quantize or --tensor-parallel"


def test_an_adapter_is_merged_before_the_weights_are_cut(llama, tmp_path):
    """Rows of all ranks, one below the other, are those of the merged model; columns beside one another."""
    import transformers
    from lora.adapters import write_adapter

    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    adapter = write_adapter(tmp_path / "adapter", model, ["q_proj", "o_proj"])
    one = exported(llama, tmp_path / "one", 1, weights="copy", merge_lora=adapter)
    two = exported(llama, tmp_path / "two", 2, weights="copy", merge_lora=adapter)
    base = weights_of(exported(llama, tmp_path / "base", 1, weights="copy"))
    whole, ranks = weights_of(one), [weights_of(two / f"rank{rank}") for rank in range(2)]
    for module, axis in (("q_proj", 0), ("o_proj", 1)):
        name = f"model.layers.1.self_attn.{module}.weight"
        shape = (-1, 64) if axis == 0 else (64, -1)
        parts = [np.frombuffer(rank[name], np.float32).reshape(shape) for rank in ranks]
        merged = np.frombuffer(whole[name], np.float32).reshape(64, 64)
        assert np.array_equal(np.concatenate(parts, axis), merged)
        assert whole[name] != base[name]
