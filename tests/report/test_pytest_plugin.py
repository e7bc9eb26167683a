"""The pytest plugin, as a user meets it: a process of its own in a folder with tests of his own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from gqa_export.bundle.manifest import DATA, MANIFEST
from gqa_export.files.sha256 import file_sha256

pytestmark = pytest.mark.whole_model


def run(folder: Path, *arguments) -> subprocess.CompletedProcess:
    load = [] if installed() else ["-p", "gqa_export.integrations.pytest_plugin"]
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:logging", *load,
                           *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@cache
def installed() -> bool:
    """Whether the entry point is installed, as seen from elsewhere: this folder may hold older metadata."""
    code = "from importlib.metadata import entry_points as e; print(*(x.value for x in e(group='pytest11')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tempfile.gettempdir(), capture_output=True, text=True,
                          check=True)
    return "gqa_export.integrations.pytest_plugin" in done.stdout.split()


def test_pyproject_names_the_plugin():
    import tomllib

    import gqa_export

    project = tomllib.loads((Path(gqa_export.__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"gqa_export": "gqa_export.integrations.pytest_plugin"}


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


def test_a_changed_bundle_and_an_absent_one_fail_with_the_cause_and_without_a_traceback(bundle, checkpoint, tmp_path):
    """One stored number is tripled, and the manifest made to agree."""
    folder = Path(shutil.copytree(bundle, tmp_path / "changed"))
    values = np.frombuffer((folder / DATA).read_bytes(), np.float32).copy()
    values[np.abs(values).argmax()] *= 3
    (folder / DATA).write_bytes(values.tobytes())
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][DATA]["sha256"] = file_sha256(folder / DATA)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    done = run(tmp_path, "--gqa-bundle", folder, "--gqa-bundle", tmp_path / "nowhere", "--gqa-against", checkpoint,
               "--gqa-steps", 4, "-k", "logits")
    assert done.returncode == 1
    changed, nowhere = sorted(done.stdout.split("____ gqa[")[1:])
    assert ", logits, batch " in changed
    assert "the bundle folder does not exist" in nowhere
    assert "fix:" in nowhere
    assert "2 failed" in done.stdout
    assert "skipped" not in done.stdout
    assert "Traceback" not in done.stdout


ONLY_LOGITS = """
from dataclasses import replace
from gqa_export.validation import validate as module
whole = module.validate

def narrow(*arguments, **options):
    verdict = whole(*arguments, **options)
    cases = [replace(case, free=False, kinds=tuple(kind for kind in case.kinds if kind.kind == "logits"))
             for case in verdict.cases]
    return replace(verdict, cases=tuple(case for case in cases if case.kinds))

module.validate = narrow
"""


def test_what_was_not_compared_is_skipped_with_the_reason_and_never_passes(bundle, checkpoint, tmp_path):
    """A model whose own cache holds latents has no keys and values to compare."""
    (tmp_path / "conftest.py").write_text(ONLY_LOGITS)
    done = run(tmp_path, "--gqa-bundle", bundle, "--gqa-against", checkpoint, "--gqa-steps", 4, "-rs")
    assert "1 passed, 5 skipped" in done.stdout, done.stdout + done.stderr
    assert "keys: nothing was compared (logits was); PyTorch's own cache" in done.stdout


@pytest.mark.parametrize(("options", "says"), [
    (["--gqa-bundle", "x"], "belong together"), (["--gqa-against", "x"], "belong together"),
    (["--gqa-baseline", "x"], "needs --gqa-bundle"),
])
def test_options_that_make_no_sense_alone_are_refused(options, says, tmp_path):
    done = run(tmp_path, *options)
    assert done.returncode == 4
    assert says in done.stderr
