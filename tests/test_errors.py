"""Every refusal has a stable code: literal, of a known area, of one kind; docs/errors.md lists it with its fix."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

import gqa_export

ROOT = Path(gqa_export.__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("error_tables", ROOT / "scripts" / "error_tables.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["error_tables"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def refusals(script):
    return script.all_refusals()


def test_every_refusal_has_a_literal_code(script, refusals) -> None:
    missing = script.without_code(refusals)
    assert not missing, "\n".join(missing)


def test_codes_are_well_formed_and_of_a_known_area(script, refusals) -> None:
    wrong = script.malformed(refusals)
    assert not wrong, "\n".join(wrong)


def test_a_code_belongs_to_one_kind_of_error(script, refusals) -> None:
    shared = script.of_two_kinds(refusals)
    assert not shared, "\n".join(shared)


def test_every_refusal_has_a_fix(refusals) -> None:
    missing = [f"{r.module}:{r.line} {r.what}" for r in refusals if not r.fix]
    assert not missing, "\n".join(missing)


def test_page_of_errors_lists_every_code_in_the_source(script, refusals) -> None:
    assert script.PAGE.read_text(encoding="utf-8") == script.page(refusals), "run scripts/error_tables.py"


SOURCE = '''
FIX = "export it again"
def broken(what, name, code):
    return InvalidBundle(f"the bundle is {what}: {name}", name, FIX, code=code)
def check(path, count, word):
    if count:
        raise GqaExportError(f"{count} files", path, FIX, code="E-FILE-COUNT")
    if not count:
        raise broken("damaged", path, code="E-BUNDLE-DAMAGED")
    if word:
        raise errors.NotCheckedHere("not here", fix="install it", code=CODES[word])
    raise UnsupportedModel("a layer", "", FIX)
def again(error):
    raise NotCheckedHere(error.what, error.where, error.fix, code=error.code) from error
'''


@pytest.fixture
def found(script):
    tree = ast.parse(SOURCE)
    return {r.what: r for r in script.refusals_in(ROOT / "example.py", tree, {}, script.makers(tree))}


def test_codes_are_read_from_the_source_also_through_a_function_that_makes_errors(script, found) -> None:
    assert {what: (r.kind, r.code) for what, r in found.items()} == {
        "... files": ("GqaExportError", "E-FILE-COUNT"),
        "the bundle is damaged: ...": ("InvalidBundle", "E-BUNDLE-DAMAGED"),
        "not here": ("NotCheckedHere", ""),
        "a layer": ("UnsupportedModel", ""),
    }
    assert {r.fix for r in found.values()} == {"export it again", "install it"}
    missing = script.without_code([found["not here"], found["a layer"], found["... files"]])
    assert [line.split(": ")[2] for line in missing] == ["not here", "a layer"]


@pytest.mark.parametrize("code", ["E-FILE", "E-file-FULL", "E-DISK-FULL", "FILE-FULL", "E-FILE-FULL-"])
def test_a_malformed_code_is_found(script, found, code: str) -> None:
    from dataclasses import replace

    good = found["... files"]
    assert script.malformed([good]) == []
    assert len(script.malformed([replace(good, code=code)])) == 1


def test_a_code_of_two_kinds_is_found(script, found) -> None:
    from dataclasses import replace

    good = found["... files"]
    assert script.of_two_kinds([good, good]) == []
    assert script.of_two_kinds([good, replace(good, kind="InvalidBundle")]) == [
        "E-FILE-COUNT is used by GqaExportError and InvalidBundle"]


def test_a_row_of_the_page_holds_all_messages_of_a_code(script, found) -> None:
    from dataclasses import replace

    good = found["... files"]
    page = script.page([good, replace(good, what="too many | files")])
    assert "| `E-FILE-COUNT` | ... files <br> too many \\| files | export it again | GqaExportError | 2 |" in page
