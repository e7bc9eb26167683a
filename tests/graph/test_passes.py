"""Passes count their work, and a count that was not expected is an error that tells what happened before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gqa_export.errors import GqaExportError
from gqa_export.graph.passes import Pass, run_passes

GRAPH = SimpleNamespace(name="qwen3")


def test_counts_of_all_passes_come_back_in_order():
    passes = [Pass("first", lambda graph, context: 2),
              Pass("second", lambda graph, context: context, lambda context: 3)]
    assert list(run_passes(GRAPH, passes, 3).items()) == [("first", 2), ("second", 3)]


def test_a_pass_that_runs_twice_is_added_up():
    assert run_passes(GRAPH, [Pass("again", lambda graph, context: 2)] * 2) == {"again": 4}


def test_counts_go_on_from_those_given():
    counts = {"earlier": 1}
    assert run_passes(GRAPH, [Pass("later", lambda graph, context: 0)], counts=counts) is counts
    assert counts == {"earlier": 1, "later": 0}


def test_an_unexpected_count_names_the_pass_the_graph_and_what_went_before():
    passes = [Pass("fold_rotary", lambda graph, context: 2), Pass("lower", lambda graph, context: 1, lambda context: 2)]
    with pytest.raises(GqaExportError) as caught:
        run_passes(GRAPH, passes)
    assert caught.value.what == "lower rewrote 1 nodes, expected 2"
    assert caught.value.where == "graph 'qwen3', earlier passes {'fold_rotary': 2}"
    assert caught.value.fix


def test_a_pass_may_expect_nothing_in_particular():
    assert run_passes(GRAPH, [Pass("free", lambda graph, context: 7, lambda context: None)]) == {"free": 7}
