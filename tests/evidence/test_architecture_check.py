"""Is the table of architectures whole, of this transformers, and what the documentation shows?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gqa_export.cli import main
from gqa_export.describe.architectures import ENDS, counts, document, drawn_at, known_names, later_rows, missing, table

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


def test_a_row_is_stale_when_other_versions_or_another_small_configuration_made_it():
    from matrix import drawing, stale

    here = {"transformers": "1.1"}
    row = drawing("helium")
    assert row["scalars"]["rms_norm_eps"] == 1e-8
    data = {"versions": here, "rows": {"helium": row}}
    assert not stale("helium", data, here)
    assert stale("llama", data, here)
    assert stale("helium", data, {"transformers": "1.2"})
    assert stale("helium", {**data, "rows": {"helium": {**row, "made_with": {"transformers": "1.0"}}}}, here)
    assert stale("helium", {**data, "rows": {"helium": {**row, "drawn": "before"}}}, here)


def test_a_row_shows_the_numbers_that_it_was_drawn_at():
    from matrix import drawing

    shown = drawn_at({"scalars": drawing("helium")["scalars"]})
    assert "rms_norm_eps 1e-08" in shown
    assert drawn_at({}) == ""
    rows = {"old": {"verdict": "supported", "worst": {"ort/growing": [1, 2]}}, "new": {"verdict": "refused"}}
    page = document({"rows": rows, "versions": {}, "date": "2020-01-01"})
    assert "1 rows do not show what they were drawn at" in page


@pytest.mark.parametrize("name", sorted(table()["rows"]))
def test_only_sizes_of_a_small_configuration_shrink(name):
    """What goes into arithmetic is as the class has it, or as `matrix.toml` has it from published models."""
    from gqa_models.shrink import _tables, scalars, small_config
    from transformers import AutoConfig

    try:
        default = scalars(AutoConfig.for_model(name))
    except Exception:  # a class without usable defaults, or with several decoders
        pytest.skip("nothing to compare with")
    small, own = scalars(small_config(name)), _tables()["models"].get(name, {})
    changed = {key.rpartition(".")[2] for key in default if small.get(key) != default[key]}
    published = {key.rpartition(".")[2] for outer, inner in own.items()
                 for key in (outer, *(inner if isinstance(inner, dict) else ()))}
    assert changed <= published | OF_SIZES


OF_SIZES = {"attention_multiplier", "partial_rotary_factor"}
"""computed from sizes where a configuration does not give them: by HyperCLOVA X, by DeepSeek-V4 and dots3"""
