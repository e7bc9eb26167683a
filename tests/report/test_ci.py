"""The ready CI files: they parse, and every command in them is one that exists."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest
import yaml

import gqa_export

CI = Path(gqa_export.__file__).parent.parent / "docs" / "ci"


def scripts(name: str) -> list[str]:
    data = yaml.safe_load((CI / name).read_text())
    if name.startswith("gitlab"):
        return data["gqa-export"]["script"]
    return [step["run"] for step in data["jobs"]["validate"]["steps"] if "run" in step]


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_every_command_is_one_that_exists(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    for line in scripts(name):
        program, *rest = shlex.split(line.replace("$TARGET", "ort"))
        if program == "gqa-export":
            verb, *arguments = rest
            importlib.import_module(f"gqa_export.cli.{verb}").command.make_context(verb, arguments)
            seen.append(verb)
    assert seen == ["onnx", "validate"]


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_reports_are_kept_when_the_verdict_is_bad_and_no_failure_is_ignored(name):
    text = (CI / name).read_text()
    written = {word for line in scripts(name) for word in shlex.split(line) if word.startswith("gqa-export.")}
    assert written == {"gqa-export.html", "gqa-export.json", "gqa-export.xml"}
    kept = text.split("artifact", 1)[1]
    assert all(file in kept for file in written)
    assert "always" in text
    assert "continue-on-error" not in text
    assert "allow_failure" not in text
    assert "|| true" not in text
