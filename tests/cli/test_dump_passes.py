"""`gqa-export onnx --dump-passes DIR` and the remarks of a lowering, as a user meets them."""

from __future__ import annotations

import json

import gqa_models
import onnx
import pytest
from click.testing import CliRunner

from gqa_export.cli import main
from gqa_export.lowering.ort import position_guard
from gqa_export.trace.capture import capture

OURS = "[0-9][0-9][0-9]-*.onnx"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny Llama checkpoint."""
    return gqa_models.write_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def export(program):
    """export(checkpoint, out, ...): run the verb as a program."""
    return lambda checkpoint, out, *words: program("onnx", checkpoint, "-o", out, "--no-validate", *words)


def export_here(checkpoint, out, *words):
    """The same in this process, where a test has put a fault in."""
    return CliRunner().invoke(main, list(map(str, ["onnx", checkpoint, "-o", out, "--no-validate", *words])))


def inline_bytes(model):
    """Bytes of constants that are in the model itself."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


@pytest.mark.parametrize("target", ["ort", "onnx", "portable", "trt-plugin", "trt-native"])
def test_the_graph_after_each_pass_is_written_and_the_export_is_the_same(tiny, tmp_path, export, target):
    words = ["--target", target, "--capacity", 64]
    plain = export(tiny, tmp_path / "plain", *words)
    dumped = export(tiny, tmp_path / "dumped", *words, "--dump-passes", tmp_path / "passes")
    assert (plain.returncode, dumped.returncode) == (0, 0), plain.stderr + dumped.stderr
    assert (tmp_path / "plain/model.onnx").read_bytes() == (tmp_path / "dumped/model.onnx").read_bytes()
    rows = json.loads((tmp_path / "passes/passes.json").read_text())
    assert [row["file"] for row in rows] == sorted(path.name for path in (tmp_path / "passes").glob(OURS))
    assert rows[0]["file"] == "000-traced.onnx"
    last = "check_attention" if target == "portable" else "lower_attention"
    assert next(row for row in rows if row["pass"] == last)["count"] == 3
    outputs = None
    for row in rows:
        model = onnx.load(str(tmp_path / "passes" / row["file"]), load_external_data=False)
        assert len(model.graph.node) == row["nodes"]
        assert inline_bytes(model) < 20_000, "no weight is inside"
        names = {tensor.name for tensor in (*model.graph.input, *model.graph.initializer)}
        for node in model.graph.node:
            assert {name for name in node.input if name} <= names, node.name
            names.update(node.output)
        assert [value.name for value in model.graph.input if not value.name.startswith("past_key_values.")] in (
            ["input_ids", "attention_mask"], ["input_ids", "past_lengths", "new_lengths"])
        outputs = outputs or [value.name for value in model.graph.output]
        assert [value.name for value in model.graph.output] == outputs
    final = onnx.load(str(tmp_path / "dumped/model.onnx"), load_external_data=False)
    assert len(final.graph.node) == rows[-1]["nodes"]


def test_a_folder_that_is_not_empty_is_refused_untouched_before_any_work(tiny, tmp_path, export):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    for words in ([], ["--force"]):
        done = export(tiny, tmp_path / "bundle", "--dump-passes", taken, *words)
        assert done.returncode == 2
        assert str(taken) in done.stderr
        assert "Traceback" not in done.stderr
        assert [path.name for path in taken.iterdir()] == ["mine.txt"]
        assert not (tmp_path / "bundle").exists()


def test_force_replaces_an_earlier_dump_as_a_whole(tiny, tmp_path, export):
    folder = tmp_path / "passes"
    assert export(tiny, tmp_path / "bundle", "--dump-passes", folder).returncode == 0
    assert len(list(folder.glob(OURS))) > 5
    (folder / "notes.txt").write_text("mine")
    assert export(tiny, tmp_path / "other", "--dump-passes", folder).returncode == 2
    done = export(tiny, tmp_path / "bundle", "--dump-passes", folder, "--force", "--target", "portable")
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "passes.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [row["file"] for row in rows] + ["notes.txt", "passes.json"])
    assert [row["pass"] for row in rows] == ["traced", "check_attention", "check_states"]


def test_a_dry_run_takes_no_dump(tiny, tmp_path, export):
    done = export(tiny, tmp_path / "bundle", "--dry-run", "--dump-passes", tmp_path / "passes")
    assert done.returncode == 2
    assert "--dump-passes" in done.stderr
    assert not (tmp_path / "passes").exists()


def test_when_a_pass_fails_the_graph_before_and_after_it_is_there(tiny, tmp_path, monkeypatch):
    """In a version whose last pass does not find its pattern."""
    monkeypatch.setattr(position_guard, "_guarded", lambda node: None)
    done = export_here(tiny, tmp_path / "bundle", "--dump-passes", tmp_path / "passes")
    assert done.exit_code == 2, done.stderr
    assert "lean_guard rewrote 0 nodes, expected 1" in done.stderr
    assert "--dump-passes" in done.stderr
    rows = json.loads((tmp_path / "passes/passes.json").read_text())
    assert (rows[-1]["pass"], rows[-1]["count"], rows[-1]["expected"]) == ("lean_guard", 0, 1)
    for row in rows[-2:]:
        assert onnx.load(str(tmp_path / "passes" / row["file"]), load_external_data=False).graph.node
    assert not (tmp_path / "bundle").exists()


def test_remarks_of_the_lowering_are_printed_once_for_all_their_layers(tmp_path, export):
    checkpoint = gqa_models.write_tiny("gemma2", tmp_path / "checkpoint")
    done = export(checkpoint, tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    notes = [line.strip() for line in done.stdout.splitlines() if "rotary stays outside attention" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: layers 0-3: rotary stays outside attention: ")


def no_types(*_, **__):
    """An onnx that cannot infer the types of this graph."""
    raise onnx.shape_inference.InferenceError("node 7 has another type\nand more")


def not_recorded(*_, **__):
    """A model that the light capture cannot record."""
    raise capture.NotCaptured("a branch on a length")


@pytest.mark.parametrize(("place", "name", "fault", "words", "extra"), [
    (onnx.shape_inference, "infer_shapes", no_types,
     ("layers 0-", "could not be inferred", "not fused", "node 7 has another type"), ()),
    (capture, "capture", not_recorded, ("traced by torch.export", "a branch on a length"), ("--dry-run",))],
    ids=["types", "capture"])
def test_what_makes_an_export_slower_is_printed(tiny, tmp_path, monkeypatch, place, name, fault, words, extra):
    monkeypatch.setattr(place, name, fault)
    done = export_here(tiny, tmp_path / "bundle", "--no-trace-cache", *extra)
    assert done.exit_code == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if line.startswith("  note: ") and words[0] in line]
    assert len(notes) == 1, done.stdout
    assert all(word in notes[0] for word in words)
