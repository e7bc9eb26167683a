"""Every field of a manifest, changed: a bundle whose graph or weights are damaged must not pass because of it. A
stricter verdict is allowed, a refusal too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from shared_reference import reference_of

from gqa_export.bundle.manifest import DATA, MANIFEST, MODEL, read_manifest
from gqa_export.compare.verdict import Verdict
from gqa_export.errors import GqaExportError
from gqa_export.validation.validate import validate

from .conftest import edit_manifest, sign

pytestmark = pytest.mark.whole_model
STEPS = 2
WORDS = {"target": ("onnx", "portable", "trt-plugin", "trt-native", "ort"), "cache": ("growing", "static"),
         "logits": ("all", "last"), "weights": ("copy", "link", "inplace"),
         "dtype": ("fp32", "float16", "fp16", "bfloat16", "bf16")}


def wrong_value_cache(model) -> None:
    """The values that layer 0 hands out are a thousandth larger than those it attends to: no prompt shows it."""
    node = next(node for node in model.graph.node if "present.0.value" in node.output)
    node.output[list(node.output).index("present.0.value")] = "values"
    model.graph.initializer.append(onnx.helper.make_tensor("factor", onnx.TensorProto.FLOAT, [], [1.001]))
    model.graph.node.append(onnx.helper.make_node("Mul", ["values", "factor"], ["present.0.value"]))


def wrong_first_logits(model) -> None:
    """The logits of the first new token are wrong where there are several."""
    output = next(node for node in model.graph.node if "logits" in node.output)
    output.output[list(output.output).index("logits")] = "right"
    for name, kind, value in (("zero", 7, [0]), ("one", 7, [1]), ("axis", 7, [1]), ("end", 7, [1 << 40]),
                              ("amiss", 1, [1.5])):
        model.graph.initializer.append(onnx.helper.make_tensor(name, kind, [1], value))
    model.graph.node.extend([
        onnx.helper.make_node("Slice", ["right", "zero", "one", "axis"], ["first"]),
        onnx.helper.make_node("Slice", ["right", "one", "end", "axis"], ["rest"]),
        onnx.helper.make_node("Mul", ["first", "amiss"], ["moved"]),
        onnx.helper.make_node("Concat", ["moved", "rest"], ["logits"], axis=1)])


def wrong_weight(folder: Path) -> None:
    values = np.frombuffer((folder / DATA).read_bytes(), np.float32).copy()
    values[np.abs(values).argmax()] *= 1.5
    (folder / DATA).write_bytes(values.tobytes())


@pytest.fixture(scope="module", params=["cache", "logits", "weight"])
def damaged(request, bundle, tmp_path_factory) -> Path:
    """A bundle that does not pass, its manifest made to vouch for it."""
    folder = Path(shutil.copytree(bundle, tmp_path_factory.mktemp(request.param) / "damaged"))
    if request.param == "weight":
        wrong_weight(folder)
    else:
        model = onnx.load(str(folder / MODEL), load_external_data=False)
        {"cache": wrong_value_cache, "logits": wrong_first_logits}[request.param](model)
        onnx.save(model, str(folder / MODEL))
    sign(folder)
    return folder


def judged(folder: Path, checkpoint: Path) -> Verdict | None:
    """The verdict, None for a refusal. Any other exception is an error of the test."""
    try:
        manifest = read_manifest(folder)
        known = reference_of(checkpoint, manifest) if manifest.capacity == 128 else None
        return validate(folder, checkpoint, steps=STEPS, reference=known)
    except GqaExportError:
        return None


def others(value: Any, name: str) -> Iterator[Any]:
    """Values of another meaning for a field of this name and value; Ellipsis: without it."""
    if name in WORDS:
        yield from (word for word in WORDS[name] if word != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from dict.fromkeys((0, 1, value - 1, 2 * value + 16))
    elif isinstance(value, float):
        yield from (0.0, 1.001 * value)
    elif isinstance(value, str):
        yield from ("", "other")
    elif isinstance(value, list):
        yield from ([], value[:1], value[::-1], list(range(300)))
    else:
        yield from ({}, None)
    yield ...


def changes(data: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every field of a manifest with every other value for it."""
    for name, value in data.items() if isinstance(data, dict) else enumerate(data):
        at = (*here, name)
        for other in others(value, str(name)):
            if other is ... or other != value:
                yield at, other
        if isinstance(value, dict | list) and not (here and here[0] == "versions"):
            yield from changes(value, at)


def spared(at: tuple[Any, ...]) -> bool:
    """Fields that are like one that is tried (layer 1 is like layer 0), and notes on where the bundle came from."""
    later = (len(at) > 2 and at[:2] == ("spec", "layers") and at[2] > 0) or (
        len(at) > 1 and at[0] in ("inputs", "outputs") and at[1] > 3)
    notes = at[0] in ("versions", "bytes_copied", "bytes_linked") or (
        at[0] == "source" and len(at) > 1 and at[1] not in ("text_only", "revision", "checkpoint"))
    return bool(later or notes)


def changed(data: Any, at: tuple[Any, ...], other: Any) -> None:
    for name in at[:-1]:
        data = data[name]
    if other is ...:
        del data[at[-1]]
    else:
        data[at[-1]] = other


def test_no_field_of_the_manifest_lets_a_damaged_bundle_pass(damaged, checkpoint, tmp_path):
    before = judged(damaged, checkpoint)
    assert before is not None
    assert not before.passed
    original = (damaged / MANIFEST).read_text()
    tried, ran, passed = 0, 0, []
    for at, other in changes(json.loads(original)):
        if spared(at):
            continue
        edit_manifest(damaged, lambda data, at=at, other=other: changed(data, at, other))
        verdict = judged(damaged, checkpoint)
        (damaged / MANIFEST).write_text(original)
        tried, ran = tried + 1, ran + (verdict is not None)
        if verdict is not None and verdict.passed:
            passed.append((at, other))
    assert passed == []
    assert tried > 200
    assert 10 < ran < tried


def test_all_layers_together_cannot_switch_the_comparison_off(damaged, checkpoint):
    """What the issue found: `cached_alike` false in every layer took keys, values and cache out of the comparison."""
    original = (damaged / MANIFEST).read_text()

    def off(data: dict) -> None:
        for layer in data["spec"]["layers"]:
            layer["cached_alike"] = False

    edit_manifest(damaged, off)
    verdict = judged(damaged, checkpoint)
    (damaged / MANIFEST).write_text(original)
    assert verdict is not None
    assert not verdict.passed
    assert {"new keys and values", "cache"} <= set(verdict.compared)
