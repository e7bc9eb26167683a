"""What each device holds: the argument of the literature for GQA, in bytes that can be checked by hand."""

from __future__ import annotations

import pytest
from gqa_models import write_tiny
from refusal import refused

from gqa_export import api
from gqa_export.errors import UnsupportedModel

HIDDEN, INNER, VOCABULARY, LAYERS, SIZE = 64, 128, 320, 2, 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("ck") / "ck", num_hidden_layers=LAYERS, num_attention_heads=8,
                      num_key_value_heads=4, head_dim=SIZE)


@pytest.mark.parametrize(("ranks", "own"), [(2, 2), (4, 1), (8, 1)])
def test_a_device_holds_its_own_heads_and_of_one_head_no_less_than_the_whole(checkpoint, ranks, own):
    model, mqa, mha = api.rank_costs(checkpoint, ranks)
    assert [cost.kind for cost in (model, mqa, mha)] == ["this model", "as MQA", "as MHA"]
    assert [cost.kv_heads for cost in (model, mqa, mha)] == [own, 1, 8 // ranks]
    token = LAYERS * 2 * SIZE * 4
    assert [cost.cache_bytes_per_token for cost in (model, mqa, mha)] == [own * token, token, 8 // ranks * token]
    assert mqa.cache_bytes_per_token == mqa.whole_cache_bytes_per_token
    cut = (8 // ranks + 2 * own + 8 // ranks) * SIZE * HIDDEN + 3 * HIDDEN * INNER // ranks
    weights = 4 * (LAYERS * (cut + 2 * HIDDEN) + HIDDEN + VOCABULARY * HIDDEN * (1 + 1 / ranks))
    assert model.weight_bytes == weights
    assert mqa.weight_bytes == weights + 4 * LAYERS * 2 * (1 - own) * SIZE * HIDDEN


def test_ranks_that_do_not_divide_the_heads_are_refused(checkpoint):
    with refused("E-MODEL-SHARD-HEADS", UnsupportedModel):
        api.rank_costs(checkpoint, 3)


def test_inspect_shows_the_table(checkpoint):
    from click.testing import CliRunner

    from gqa_export.cli.inspect import command

    done = CliRunner().invoke(command, [str(checkpoint), "--tensor-parallel", "4"])
    assert done.exit_code == 0, done.output
    rows = [line for line in done.output.splitlines() if line.strip().startswith(("this model", "as MQA", "as MHA"))]
    assert [row.split()[2] for row in rows] == ["1", "1", "2"]
    assert "each of 4 devices" in done.output
