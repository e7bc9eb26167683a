"""Hub ids with a revision: the commit that was resolved is what a bundle remembers. The hub's cache is made by hand."""

from __future__ import annotations

import shutil

import pytest
from click.testing import CliRunner
from gqa_models import write_tiny

from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.cli import main
from gqa_export.errors import GqaExportError

MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub with org/tiny: the main branch has three layers, the tag v1 two."""
    home = tmp_path / "hub"
    repository = home / "models--org--tiny"
    for commit, layers in ((MAIN, 3), (OLD, 2)):
        folder = write_tiny("llama", tmp_path / commit, num_hidden_layers=layers)
        shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(MAIN)
    (repository / "refs" / "v1").write_text(OLD)
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setenv("HF_HUB_CACHE", str(home))
    return home


def test_the_commit_is_resolved_for_the_main_branch_and_for_a_tag(hub):
    assert (open_checkpoint("org/tiny").revision, open_checkpoint("org/tiny").config["num_hidden_layers"]) == (MAIN, 3)
    tagged = open_checkpoint("org/tiny", revision="v1")
    assert (tagged.revision, tagged.config["num_hidden_layers"]) == (OLD, 2)


def test_a_revision_that_is_not_there_is_refused(hub):
    with pytest.raises(GqaExportError) as refusal:
        open_checkpoint("org/tiny", revision="v9")
    assert "org/tiny" in refusal.value.where


def test_a_revision_of_a_local_folder_is_refused(hub, tmp_path):
    with pytest.raises(GqaExportError) as refusal:
        open_checkpoint(tmp_path / MAIN, revision="v1")
    assert refusal.value.code == "E-OPTION-REVISION"


def test_a_bundle_is_compared_with_the_commit_it_was_made_from_though_the_branch_moved_on(hub, tmp_path):
    def command(*words):
        return CliRunner().invoke(main, list(map(str, words)))

    made = command("onnx", "org/tiny", "-o", tmp_path / "out", "--revision", "v1", "--no-validate")
    assert made.exit_code == 0, made.stderr
    from gqa_export.bundle.manifest import read_manifest

    manifest = read_manifest(tmp_path / "out")
    assert (manifest.source["checkpoint"], manifest.source["revision"]) == ("org/tiny", OLD)
    against = ("validate", tmp_path / "out", "--against", "org/tiny", "--steps", 2)
    checked = command(*against)
    assert checked.exit_code == 0, checked.output
    other = command(*against, "--revision", "main")
    assert other.exit_code == 2, other.output  # another number of layers
