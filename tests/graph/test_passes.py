"""Passes count their work; a wrong count, a broken promise and a wrong order are errors that name the place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from refusal import refused

from gqa_export.errors import UnsupportedModel
from gqa_export.graph.passes import SHOWN, NearMiss, Pass, PassLog, PassRun, Rewritten, check_order, run_passes

GRAPH = SimpleNamespace(name="qwen3")


def counting(name: str, count: int, **facts) -> Pass:
    return Pass(name, lambda graph, context: count, **facts)


def test_counts_of_all_passes_come_back_in_order():
    passes = [counting("first", 2), Pass("second", lambda graph, context: context, lambda context: 3)]
    assert list(run_passes(GRAPH, passes, 3).counts.items()) == [("first", 2), ("second", 3)]


def test_a_pass_that_runs_twice_is_added_up():
    assert run_passes(GRAPH, [counting("again", 2)] * 2, None).counts == {"again": 4}


def test_counts_go_on_from_those_given():
    log = PassLog({"earlier": 1})
    assert run_passes(GRAPH, [counting("later", 0)], None, log) is log
    assert log.counts == {"earlier": 1, "later": 0}


def test_an_unexpected_count_names_the_pass_the_graph_and_what_went_before():
    passes = [counting("fold_rotary", 2), counting("lower", 1, expect=lambda context: 2)]
    with refused("E-GRAPH-PASS-COUNT", UnsupportedModel) as refusal:
        run_passes(GRAPH, passes, None)
    assert refusal.error.what == "lower rewrote 1 nodes, expected 2"
    assert refusal.error.where == "graph 'qwen3', earlier passes {'fold_rotary': 2}"
    assert refusal.error.fix


def test_an_unexpected_count_names_each_node_that_nearly_fitted_and_why():
    miss = NearMiss("layers.4/Foo", "it is Foo, expected Bar")
    step = Pass("lower", lambda graph, context: Rewritten(4, (miss,)), lambda context: 5)
    with refused("E-GRAPH-PASS-COUNT") as refusal:
        run_passes(GRAPH, [step], None)
    assert refusal.error.what == ("lower rewrote 4 nodes, expected 5; node 'layers.4/Foo': it is Foo, expected Bar")


def test_of_many_near_misses_a_message_lists_some_and_the_log_has_all():
    misses = tuple(NearMiss(f"n{place}", "why") for place in range(SHOWN + 3))
    step = Pass("lower", lambda graph, context: Rewritten(0, misses), lambda context: 1)
    log = PassLog()
    with refused("E-GRAPH-PASS-COUNT") as refusal:
        run_passes(GRAPH, [step], None, log)
    assert refusal.error.what.endswith("and 3 more")
    assert [(miss.node, miss.step) for miss in log.near_misses] == [(miss.node, "lower") for miss in misses]


def test_near_misses_of_passes_that_expect_nothing_are_kept():
    step = Pass("fuse", lambda graph, context: Rewritten(0, (NearMiss("norm", "exponent 3"),)))
    assert run_passes(GRAPH, [step], None).near_misses == [NearMiss("norm", "exponent 3", "fuse")]


def test_a_pass_may_expect_nothing_in_particular():
    assert run_passes(GRAPH, [counting("free", 7, expect=lambda context: None)], None).counts == {"free": 7}


def test_a_promise_that_does_not_hold_is_an_error_that_names_the_place():
    step = counting("lower", 1, expect=lambda context: 1,
                    ensures=lambda graph, context: [NearMiss("left", "it still is Foo")])
    with refused("E-GRAPH-PASS-PROMISE", UnsupportedModel) as refusal:
        run_passes(GRAPH, [step], None)
    assert "'left'" in refusal.error.what


def test_a_list_in_the_wrong_order_is_refused_before_anything_runs():
    ran = []
    first = Pass("fuse", lambda graph, context: ran.append("fuse") or 0)
    second = Pass("lower", lambda graph, context: ran.append("lower") or 0, requires=("fuse",))
    with refused("E-GRAPH-PASS-ORDER"):
        run_passes(GRAPH, [second, first], None)
    assert ran == []
    run_passes(GRAPH, [first, second], None)
    assert ran == ["fuse", "lower"]


def test_what_an_earlier_list_ran_counts_for_the_order():
    check_order([counting("lower", 0, requires=("fuse",))], ["fuse"])
    with refused("E-GRAPH-PASS-ORDER"):
        check_order([counting("lower", 0, requires=("fuse", "other"))], ["fuse"])


@pytest.mark.parametrize("expected", [None, 2, 3])
def test_who_watches_sees_every_graph_that_of_a_failing_pass_too(expected):
    seen = []
    log = PassLog(watch=lambda run, graph: seen.append((run, graph)))
    step = counting("lower", 2, expect=lambda context: expected)
    if expected == 3:
        with refused("E-GRAPH-PASS-COUNT"):
            run_passes(GRAPH, [step], None, log)
    else:
        run_passes(GRAPH, [step], None, log)
    assert seen == [(PassRun("lower", 2, expected, ()), GRAPH)]
