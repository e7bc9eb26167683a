"""The pytest plugin, as a user meets it: a process of its own in a folder with tests of his own."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gqa_export.bundle import MODEL
from gqa_export.bundle_check import file_sha256


def run(folder: Path, *arguments, plugin: bool = True) -> subprocess.CompletedProcess:
    load = [] if not plugin or installed() else ["-p", "gqa_export.pytest_plugin"]
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:logging", *load,
                           *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def installed() -> bool:
    return any(entry.value == "gqa_export.pytest_plugin" for entry in entry_points(group="pytest11"))


def test_pyproject_names_the_plugin():
    import tomllib

    import gqa_export

    project = tomllib.loads((Path(gqa_export.__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"gqa_export": "gqa_export.pytest_plugin"}


def test_a_good_bundle_passes_and_the_users_own_tests_see_the_verdict(bundle, checkpoint, tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "def test_mine(gqa_verdicts):\n"
        "    (verdict,) = gqa_verdicts.values()\n"
        "    assert verdict.max_abs_logits < 1e-3\n")
    done = run(tmp_path, "--gqa-bundle", bundle, "--gqa-against", checkpoint, "--gqa-steps", 4, "-v",
               "--junit-xml", "j.xml")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [test.get("name") for test in ElementTree.parse(tmp_path / "j.xml").iter("testcase")]
    assert names == ["test_mine", *(f"gqa[tiny-{check}]" for check in ("keys", "values", "logits", "cache",
                                                                        "best_tokens", "refusals"))]


def test_a_changed_bundle_fails_with_the_cause_and_without_a_traceback(bundle, checkpoint, tmp_path):
    import json
    import shutil

    import onnx

    folder = shutil.copytree(bundle, tmp_path / "changed")
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    node = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"][1]
    next(attribute for attribute in node.attribute if attribute.name == "scale").f *= 1.01
    onnx.save(model, str(folder / MODEL))
    manifest = json.loads((folder / "gqa_export.json").read_text())
    manifest["files"][MODEL] |= {"size": (folder / MODEL).stat().st_size, "sha256": file_sha256(folder / MODEL)}
    (folder / "gqa_export.json").write_text(json.dumps(manifest))
    done = run(tmp_path, "--gqa-bundle", folder, "--gqa-against", checkpoint, "--gqa-steps", 4, "-k", "logits or cache")
    assert done.returncode == 1  # only what comes after the last layer differs
    assert "case long, step 0 (prefill), logits, batch 0" in done.stdout
    assert "1 failed, 1 passed" in done.stdout
    assert "Traceback" not in done.stdout


def test_what_cannot_be_checked_fails_and_says_why(checkpoint, tmp_path):
    done = run(tmp_path, "--gqa-bundle", tmp_path / "nowhere", "--gqa-against", checkpoint, "-k", "keys")
    assert done.returncode == 1
    assert "no such bundle folder" in done.stdout
    assert "fix:" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(("options", "says"), [
    (["--gqa-bundle", "x"], "belong together"), (["--gqa-against", "x"], "belong together"),
    (["--gqa-baseline", "x"], "needs --gqa-bundle"),
])
def test_options_that_make_no_sense_alone_are_refused(options, says, tmp_path):
    done = run(tmp_path, *options)
    assert done.returncode == 4
    assert says in done.stderr
