"""The committed rows of scripts/tensor_parallel.py are of today's families and architectures, and none is wrong."""

from __future__ import annotations

import json
from pathlib import Path

from benchmark_ranks import markdown
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


def test_smollm2_over_three_ranks_was_built_with_one_list_of_collectives():
    """As tests/engine/test_rtx_ranks.py builds its first two layers: the same names, after the same products."""
    small = json.loads((COMMITTED.parent / "tensor-parallel.json").read_text())["smollm2"]
    assert (small["ranks"], small["layers"], len(small["engine_mb"])) == (3, 30, 3)
    assert small["collectives"] == [
        *(f"all_reduce sum of 3: model.layers.{layer}.{module}/MatMul_0/all_reduce" for layer in range(30)
          for module in ("self_attn.o_proj", "mlp.down_proj")), "all_gather none of 3: lm_head/MatMul_0/all_gather"]
    assert small["engine_collectives"] == [each.split()[0] for each in small["collectives"]]
    assert small["logits"][0] <= small["logits"][1]
    assert small["cases"] > 3
    page = (COMMITTED.parent / "tensor-parallel.md").read_text()
    assert page == markdown(json.loads((COMMITTED.parent / "tensor-parallel.json").read_text())), "the script wrote it"
