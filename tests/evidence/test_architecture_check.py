"""Is the table of architectures whole, of this transformers, and what the documentation shows?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gqa_export.cli import main
from gqa_export.describe.architectures import ENDS, counts, document, known_names, later_rows, missing, table

DOCS = Path(__file__).parent.parent.parent / "docs" / "models.md"
AGAIN = "python scripts/matrix.py --resume"


def test_every_causal_language_model_that_transformers_knows_has_a_row():
    import transformers

    made_with = table()["versions"]["transformers"]
    if transformers.__version__ != made_with:
        lacking = missing(table()["rows"], known_names())
        assert not lacking, (f"transformers {transformers.__version__} knows {lacking}, the table was made with "
                             f"{made_with}: run `{AGAIN}`")
    else:
        assert set(table()["rows"]) == set(known_names())


def test_every_row_says_how_it_ended_and_why():
    for name, row in table()["rows"].items():
        assert row["verdict"] in ENDS, name
        if row["verdict"] == "supported":
            assert {"ort/growing", "portable/growing"} <= set(row["worst"]), name
            assert all(found <= bound for found, bound in row["worst"].values()), name
        else:
            assert row["reason"], name


def test_the_documentation_is_the_table():
    assert DOCS.read_text(encoding="utf-8") == document(table()), "run `python scripts/matrix.py --docs`"


def test_the_verb_prints_the_table_as_data_and_as_text():
    runner = CliRunner()
    data = runner.invoke(main, ["models", "--json"])
    assert json.loads(data.output) == table()
    shown = runner.invoke(main, ["models"])
    assert shown.exit_code == 0
    assert f"supported ({counts(table())['supported']})" in shown.output
    one = runner.invoke(main, ["models", "llama", "--json"])
    assert list(json.loads(one.output)["rows"]) == ["llama"]


@pytest.mark.parametrize("name", ["no_such_model"])
def test_a_name_that_the_table_lacks_is_refused_with_what_to_do(name):
    result = CliRunner().invoke(main, ["models", name])
    assert result.exit_code == 2
    assert AGAIN in result.output


def test_the_readme_counts_what_the_table_holds():
    readme = " ".join((DOCS.parent.parent / "README.md").read_text(encoding="utf-8").split())
    assert (f"Of the {len(table()['rows'])} causal language models that transformers knows, "
            f"{counts(table())['supported']} are exported") in readme


def test_rows_of_other_versions_than_the_table_are_told_apart_until_all_are_of_them():
    from matrix import date_rows

    old, new = {"transformers": "1.0", "torch": "2"}, {"transformers": "1.1", "torch": "2"}
    data = {"rows": {"one": {}, "two": {}}, "versions": old, "date": "2020-01-01"}
    date_rows(data, "one", old)
    assert (data["rows"], later_rows(data)) == ({"one": {}, "two": {}}, [])
    date_rows(data, "two", new)
    assert (data["versions"], later_rows(data)) == (old, ["Made with transformers 1.1: two."])
    date_rows(data, "one", new)
    assert (data["versions"], later_rows(data)) == (new, [])
    assert data["date"] != "2020-01-01"
