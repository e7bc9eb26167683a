"""Messages, help texts and pages are written in the field's words: a verb is negated, a model does not speak."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import gqa_export
from gqa_export.cli import VERBS, main

ROOT = Path(gqa_export.__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
RETIRED = {
    r"\bis no\b(?! longer)": "negate the verb: 'is not a number', not 'is no number'",
    r"\bspeak(s|ing)?\b": "graphs and models do not speak: 'generate', 'describe'",
    r"\bspoken\b": "graphs and models do not speak",
    r"\bnobody\b": "name what does not happen",
    r"\basked\b": "'required', 'requested' or 'expected'",
}
RETIRED_ON_PAGES = {
    r"\byardsticks?\b": "the same-dtype baseline",
    r"\bthe truth\b": "the fp64 reference",
    r"\bbattery\b": "the suite",
    r"\bkept traces?\b": "the trace cache",
    r"(?<!fp32 )\btwins?\b": "the fp32 twin",
}
CODE = re.compile(r"^```.*?^```|``.+?``|`[^`\n]+`|\]\([^)]+\)", re.M | re.S)


def hits(text: str, retired: dict[str, str]) -> list[str]:
    """Every retired expression in a text with its surroundings and what to write instead."""
    return [f"...{text[max(0, match.start() - 40): match.end() + 20]}...: {advice}".replace("\n", " ")
            for pattern, advice in retired.items() for match in re.finditer(pattern, text, re.I)]


@pytest.mark.parametrize("text", ["x is no number", "let it speak", "it speaks", "nobody looks", "what was asked"])
def test_a_retired_word_is_found(text: str) -> None:
    assert len(hits(text, RETIRED)) == 1


@pytest.mark.parametrize("text", ["x is not a number", "it is no longer so", "the masked row", "a task", "in no case"])
def test_other_words_are_left_alone(text: str) -> None:
    assert hits(text, {**RETIRED, **RETIRED_ON_PAGES}) == []


def test_quoted_code_and_addresses_of_links_are_left_alone() -> None:
    page = "a\n```bash\nspeak\n```\nthe `asked` option, [here](asked.md#spoken): nobody\n"
    assert len(hits(CODE.sub("", page), RETIRED)) == 1


def test_messages_of_errors_use_no_retired_words() -> None:
    spec = importlib.util.spec_from_file_location("error_tables", ROOT / "scripts" / "error_tables.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["error_tables"] = script
    spec.loader.exec_module(script)
    wrong = [f"{r.module}:{r.line}: {hit}" for r in script.all_refusals() for text in (r.what, r.where, r.fix)
             for hit in hits(text, RETIRED)]
    assert not wrong, "\n".join(wrong)


def help_texts() -> Iterator[tuple[str, str]]:
    """(place, text) of everything that --help of the program and of its verbs prints."""
    yield "gqa-export", main.help or ""
    for verb, sentence in VERBS.items():
        command: click.Command = importlib.import_module(f"gqa_export.cli.{verb}").command
        yield verb, f"{sentence}\n{command.help}\n{command.short_help}"
        for parameter in command.params:
            yield f"{verb} {parameter.name}", getattr(parameter, "help", None) or ""


def test_help_texts_use_no_retired_words() -> None:
    wrong = [f"{place}: {hit}" for place, text in help_texts() for hit in hits(text, RETIRED)]
    assert not wrong, "\n".join(wrong)


def test_the_list_of_verbs_and_the_help_of_each_agree() -> None:
    commands = {verb: importlib.import_module(f"gqa_export.cli.{verb}").command for verb in VERBS}
    assert {verb: command.short_help for verb, command in commands.items()} == VERBS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_use_no_retired_words(page: Path) -> None:
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    wrong = hits(text, {**RETIRED, **RETIRED_ON_PAGES})
    assert not wrong, "\n".join(wrong)
