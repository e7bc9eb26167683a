"""Bundles made by somebody who wants harm: refused with cause and fix, before anything outside is read."""

from __future__ import annotations

import json
import os

import onnx
import pytest
from refusal import refused

from gqa_export.bundle.integrity import check_files
from gqa_export.bundle.manifest import DATA, MANIFEST, MODEL, read_manifest
from gqa_export.errors import GqaExportError, InvalidBundle
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.validation.validate import validate

from .conftest import edit_manifest, sign


def change_graph(folder, change) -> None:
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    change(model)
    onnx.save(model, str(folder / MODEL))
    sign(folder)


def external(model):
    return next(tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)


def first_weight(folder) -> str:
    """The name of the weight that `point` changes."""
    return str(external(onnx.load(str(folder / MODEL), load_external_data=False)).name)


def point(model, **values) -> None:
    for entry in external(model).external_data:
        entry.value = str(values.get(entry.key, entry.value))


def refused_everywhere(folder, checkpoint, code: str) -> None:
    """By validate, and by whatever runs a bundle."""
    with refused(code, InvalidBundle) as refusal:
        validate(folder, checkpoint)
    assert refusal.error.fix
    with pytest.raises(GqaExportError):
        OrtSession.load(folder, "cpu")


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "a/../../secret", "secret", ""])
def test_weights_outside_of_the_bundle_are_refused(copied, checkpoint, location):
    (copied.parent / "secret").write_bytes((copied / DATA).read_bytes())
    change_graph(copied, lambda model: point(model, location=location))
    refused_everywhere(copied, checkpoint, "E-BUNDLE-WEIGHT")


def test_a_file_of_the_bundle_that_the_manifest_does_not_name_is_not_used(copied, checkpoint):
    (copied / "extra.bin").write_bytes((copied / DATA).read_bytes())
    change_graph(copied, lambda model: point(model, location="extra.bin"))
    with refused("E-BUNDLE-WEIGHT", InvalidBundle):
        validate(copied, checkpoint)


@pytest.mark.parametrize("values", [{"offset": 1 << 60}, {"offset": -64}, {"length": 1 << 62}, {"length": 4},
                                    {"offset": "x"}], ids=str)
def test_weights_beyond_the_end_of_their_file_are_refused(copied, checkpoint, values):
    change_graph(copied, lambda model: point(model, **values))
    with refused("E-BUNDLE-WEIGHT", InvalidBundle):
        validate(copied, checkpoint)


def of_themselves(model) -> None:
    """Two nodes that read one another, where a weight would be."""
    model.graph.node.append(onnx.helper.make_node("Cast", ["b"], ["a"], to=1))
    model.graph.node.append(onnx.helper.make_node("Cast", ["a"], ["b"], to=1))
    model.graph.node.append(onnx.helper.make_node("MatMul", ["b", "a"], ["c"]))


@pytest.mark.parametrize("change", [of_themselves, lambda model: model.graph.node.add(op_type="MatMul", output=["c"])])
def test_a_graph_whose_nodes_have_no_end_or_no_inputs_is_refused(copied, checkpoint, change):
    """What reads a graph from its products back to its weights comes to an end."""
    change_graph(copied, change)
    refused_everywhere(copied, checkpoint, "E-BUNDLE-CLAIM")


def test_absurd_dimensions_are_refused_before_anything_is_allocated(copied, checkpoint):
    change_graph(copied, lambda model: external(model).dims.__setitem__(0, 1 << 60))
    refused_everywhere(copied, checkpoint, "E-BUNDLE-WEIGHT")


def test_a_weight_hidden_in_a_subgraph_is_found(copied, checkpoint):
    def hide(model):
        tensor = onnx.TensorProto()
        tensor.CopyFrom(external(model))
        tensor.name = "hidden"
        for entry in tensor.external_data:
            entry.value = "../secret" if entry.key == "location" else entry.value
        graph = onnx.GraphProto(name="branch")
        graph.initializer.append(tensor)
        node = onnx.helper.make_node("If", ["condition"], ["nothing"], then_branch=graph, else_branch=graph)
        model.graph.node.append(node)

    change_graph(copied, hide)
    with refused("E-BUNDLE-WEIGHT", InvalidBundle) as refusal:
        validate(copied, checkpoint)
    assert "'hidden'" in refusal.error.what


@pytest.mark.parametrize("name", [DATA, MODEL])
def test_a_symbolic_link_out_of_the_bundle_is_refused(copied, checkpoint, name):
    os.rename(copied / name, copied.parent / "elsewhere")
    (copied / name).symlink_to(copied.parent / "elsewhere")
    refused_everywhere(copied, checkpoint, "E-BUNDLE-OUTSIDE")


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/../../x", "C:\\x", "\\\\host\\share", "a\\..\\..\\x", "",
                                  "x" * 300], ids=range(8))
def test_names_that_lead_out_of_the_bundle_are_refused_on_any_system(copied, checkpoint, name):
    edit_manifest(copied, lambda data: data["files"].__setitem__(name, {"size": 1}))
    refused_everywhere(copied, checkpoint, "E-BUNDLE-OUTSIDE")


@pytest.mark.parametrize(("name", "code"), [("nul\x00byte", "E-BUNDLE-MANIFEST"), ("\x1b[2J", "E-BUNDLE-MANIFEST"),
                                            ("\ud800", "E-BUNDLE-JSON")])
def test_names_that_no_file_may_have_are_refused(copied, checkpoint, name, code):
    edit_manifest(copied, lambda data: data["files"].__setitem__(name, {"size": 1}))
    refused_everywhere(copied, checkpoint, code)


def test_a_manifest_that_does_not_vouch_for_the_graph_is_refused(copied, checkpoint):
    edit_manifest(copied, lambda data: data["files"].pop(MODEL))
    with refused("E-BUNDLE-UNLISTED", InvalidBundle):
        validate(copied, checkpoint)


def test_a_graph_that_is_not_the_hashed_one_is_refused_even_where_weights_are_not_hashed(copied):
    data = bytearray((copied / MODEL).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / MODEL).write_bytes(data)
    for full in (False, True):
        with refused("E-BUNDLE-HASH", InvalidBundle):
            check_files(copied, read_manifest(copied), hashes=full)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff\xff\xff\xff\x7f", bytes(1000)], ids=range(4))
def test_a_graph_that_is_no_model_is_refused(copied, checkpoint, content):
    (copied / MODEL).write_bytes(content)
    sign(copied)
    refused_everywhere(copied, checkpoint, "E-BUNDLE-GRAPH")


def test_a_graph_that_fails_while_it_runs_is_a_refusal_too(copied):
    """An index that no check sees beforehand: the node fails in ONNX Runtime."""
    def sabotage(model):
        logits = model.graph.output[0].name
        last = next(node for node in model.graph.node if logits in node.output)
        last.output[list(last.output).index(logits)] = "before"
        model.graph.initializer.append(onnx.helper.make_tensor("short", onnx.TensorProto.FLOAT, [4], [0.0] * 4))
        model.graph.initializer.append(onnx.helper.make_tensor("two", onnx.TensorProto.INT64, [1], [2]))
        model.graph.node.extend([onnx.helper.make_node("Gather", ["short", "input_ids"], ["looked_up"]),
                                 onnx.helper.make_node("Unsqueeze", ["looked_up", "two"], ["as_logits"]),
                                 onnx.helper.make_node("Add", ["before", "as_logits"], [logits])])

    change_graph(copied, sabotage)
    import numpy as np

    with refused("E-RUN-FAILED"):
        OrtSession.load(copied, "cpu").step(np.full((1, 3), 7))


@pytest.mark.parametrize(("change", "place"), [
    (lambda d: d["spec"]["layers"][0].__setitem__("kv_num_heads", 1 << 40), "spec.layers[0].kv_num_heads"),
    (lambda d: d["spec"]["layers"][0].__setitem__("num_heads", 3), "spec.layers[0]"),
    (lambda d: d["spec"]["layers"][0].__setitem__("head_size", 0), "spec.layers[0].head_size"),
    (lambda d: d["spec"]["layers"][0].__setitem__("layer", 1), "spec.layers"),
    (lambda d: d["spec"]["layers"][0].__setitem__("scale", "1"), "spec.layers[0].scale"),
    (lambda d: d["spec"]["layers"][0].__setitem__("cached_alike", 1), "spec.layers[0].cached_alike"),
    (lambda d: d["spec"]["layers"][0].__setitem__("sparse", True), "spec.layers[0].sparse"),
    (lambda d: d["spec"].__setitem__("vocabulary", -5), "spec.vocabulary"),
    (lambda d: d.__setitem__("capacity", 1 << 70), "capacity"),
    (lambda d: d.__setitem__("capacity", True), "capacity"),
    (lambda d: d.__setitem__("capacity", 64.0), "capacity"),
    (lambda d: d.__setitem__("paged", False), "paged"),
    (lambda d: d.__setitem__("dtype", "complex64"), "dtype"),
    (lambda d: d.__setitem__("dtype", "float16"), "past_key_values.0.key of inputs"),
    (lambda d: d["inputs"].pop(), "inputs lack past_key_values.1.value"),
    (lambda d: d["inputs"].append(d["inputs"][0]), "inputs"),
    (lambda d: d["inputs"][0].__setitem__("layout", "BNSH"), "inputs[0].layout"),
    (lambda d: d["inputs"][2]["shape"].__setitem__(1, 7), "past_key_values.0.key of inputs"),
    (lambda d: d["inputs"][2]["shape"].__setitem__(0, -1), "inputs[2].shape[0]"),
    (lambda d: d.__setitem__("target", "a\x1b[2Jb"), "target"),
    (lambda d: d.__setitem__("tokens", {"eos": ["x"]}), "tokens.eos[0]"),
    (lambda d: d.__setitem__("tokens", {"eos": 2}), "tokens.eos"),
    (lambda d: d["files"][MODEL].__setitem__("sha256", "00"), f"files.{MODEL}.sha256"),
    (lambda d: d.__setitem__("engine", {"flavor": 3}), "engine.flavor"),
    (lambda d: d.pop("spec"), "spec"),
], ids=range(25))
def test_a_manifest_that_contradicts_itself_names_what_does(copied, change, place):
    edit_manifest(copied, change)
    with refused("E-BUNDLE-MANIFEST", InvalidBundle) as refusal:
        read_manifest(copied)
    assert refusal.error.what.removeprefix("not a valid bundle manifest: ").startswith(place)


@pytest.mark.parametrize("content", [
    b"\xff\xfe\x00", b"[" * 200_000, b'{"format": 1, "capacity": NaN}', b"1" * 5000, b'{"format": 1, "format": 1}',
    b"{" + b",".join(b'"%d":0' % i for i in range(70_000)) + b"}",
], ids=["no UTF-8", "deep", "NaN", "a number of 5000 digits", "a name twice", "70000 entries"])
def test_a_manifest_that_is_no_json_is_refused(copied, content):
    (copied / MANIFEST).write_bytes(content)
    with refused("E-BUNDLE-JSON", InvalidBundle):
        read_manifest(copied)


@pytest.mark.parametrize("field", ["files", "versions", "inputs"])
def test_a_hostile_manifest_ends_at_its_first_wrong_entry(copied, field):
    """Every wrong entry would be listed otherwise, in gigabytes."""
    from pydantic import ValidationError

    wrong = [1] * 60_000 if field == "inputs" else dict.fromkeys(map(str, range(60_000)), 1)
    edit_manifest(copied, lambda data: data.__setitem__(field, wrong))
    with refused("E-BUNDLE-MANIFEST", InvalidBundle) as refusal:
        read_manifest(copied)
    assert isinstance(refusal.error.__cause__, ValidationError)
    assert refusal.error.__cause__.error_count() == 1


def test_a_manifest_of_another_format_says_which(copied):
    edit_manifest(copied, lambda data: data.update(format=2, novel=True))
    with refused("E-BUNDLE-FORMAT", InvalidBundle):
        read_manifest(copied)


def test_a_manifest_of_gigabytes_is_not_read(copied):
    with open(copied / MANIFEST, "r+b") as file:
        file.truncate(1 << 40)  # sparse: it takes no space
    with refused("E-BUNDLE-SIZE", InvalidBundle):
        read_manifest(copied)


def test_the_manifest_of_a_good_bundle_obeys_every_rule(copied):
    text = read_manifest(copied).to_json()
    assert json.loads(text) == json.loads((copied / MANIFEST).read_text())
