"""The committed rows of scripts/tensor_parallel.py are of today's families and architectures, and none is wrong."""

from __future__ import annotations

import json
from pathlib import Path

from evidence.tensor_parallel_check import FAMILIES, RANKS

COMMITTED = Path(__file__).parents[2] / "docs" / "benchmarks" / "tensor-parallel-families.json"
TABLE = Path(__file__).parents[2] / "models" / "tensor_parallel.json"


def test_the_committed_rows_are_of_all_families_and_none_is_wrong():
    rows = json.loads(COMMITTED.read_text())
    wanted = {f"{name}/{ranks}/{target}" for name, (targets, _) in FAMILIES.items() for ranks in RANKS
              for target in targets}
    assert set(rows) == wanted
    assert {row["verdict"] for row in rows.values()} == {"sharded"}


def test_at_least_seventy_architectures_can_be_cut_and_every_other_says_why():
    rows = json.loads(TABLE.read_text())
    matrix = json.loads((TABLE.parent / "matrix.json").read_text())["rows"]
    supported = {name: row for name, row in matrix.items() if row["verdict"] == "supported"}
    assert set(rows) == {name for name, row in supported.items() if not row.get("states")}
    assert sum(row["verdict"] == "sharded" for row in rows.values()) >= 70
    assert {row["verdict"] for row in rows.values()} <= {"sharded", "refused"}
    assert all(row["reason"] and row["code"].startswith("E-") for row in rows.values() if row["verdict"] == "refused")


def test_the_graphs_of_eight_ranks_of_a_large_model_cost_little():
    """The time is the processor's: the machine that measured had other work."""
    large = json.loads((COMMITTED.parent / "tensor-parallel.json").read_text())["large"]
    assert large["ranks"] == 8
    assert large["cpu_s"] <= 90
    assert large["peak_gb"] <= 2.5
    assert large["columns_share"] < 0.36
