"""A refusal carries the cause that somebody else's exception gives, wherever in its message that stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from gqa_models import write_tiny
from refusal import refused

import gqa_export
from gqa_export.api import inspect, plan_export
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.unused_tensors import unused_notes
from gqa_export.errors import LONGEST_CAUSE, GqaExportError, InvalidCheckpoint, UnsupportedModel, cause_of


@pytest.mark.parametrize(("message", "told"), [
    ("one line", "ValueError: one line"),
    ("\n\n  Validation error for field 'x':\n    TypeError: expected int\n",
     "ValueError: Validation error for field 'x': TypeError: expected int"),
    ("", "ValueError"), ("\n", "ValueError"),
])
def test_every_line_of_a_message_is_told(message, told):
    assert cause_of(ValueError(message)) == told


def test_of_a_long_message_both_ends_are_told():
    told = cause_of(ValueError("the beginning\n" + "x" * 5000 + "\nthe end"))
    assert told.startswith("ValueError: the beginning")
    assert told.endswith("the end")
    assert len(told) <= LONGEST_CAUSE + len("ValueError: ")


def test_nothing_quotes_one_line_of_somebody_elses_message():
    """Which line of it holds the cause is not ours to know."""
    one = re.compile(r"""splitlines\(\)\[-?\d\]|split\(["']\\n["'](, 1)?\)\[-?\d\]|partition\(["']\\n["']\)""")
    root = Path(gqa_export.__file__).parent
    wrong = [f"{path.relative_to(root)}: {line.strip()}" for path in root.rglob("*.py")
             for line in path.read_text(encoding="utf-8").splitlines() if one.search(line)]
    assert not wrong, "\n".join(wrong)


def edited(tmp_path, name="llama", **change):
    folder = write_tiny(name, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    return folder


@pytest.mark.parametrize(("name", "change", "cause"), [
    ("qwen2", {"layer_types": ["full_attention"]}, "num_hidden_layers"),
    ("llama", {"num_attention_heads": 5}, "not a multiple"),
    ("llama", {"rms_norm_eps": None}, "NoneType"),
    ("llama", {"rms_norm_eps": "1e-5"}, "str"),
    ("llama", {"attention_bias": 3}, "bool"),
], ids=str)
def test_what_a_strict_configuration_refuses_is_told_with_its_cause(tmp_path, name, change, cause):
    with refused("E-CKPT-CONFIG", InvalidCheckpoint) as refusal:
        plan_export(edited(tmp_path, name, **change), capacity=64)
    assert cause in refusal.error.what
    assert next(iter(change)) in refusal.error.what or cause in ("not a multiple", "num_hidden_layers")


@pytest.mark.parametrize("use", [lambda folder: plan_export(folder, capacity=64), inspect,
                                 lambda folder: unused_notes(open_checkpoint(folder), ())])
@pytest.mark.parametrize("word", ["swoosh", "gelu_newest", ""])
def test_an_unknown_activation_is_named_with_its_field(tmp_path, word, use):
    with refused("E-MODEL-BUILD", UnsupportedModel) as refusal:
        use(edited(tmp_path, hidden_act=word))
    assert f"hidden_act {word!r}" in refusal.error.what
    assert "install" not in refusal.error.fix


@pytest.mark.parametrize("use", [lambda folder: plan_export(folder, capacity=64), inspect])
@pytest.mark.parametrize("change", [{"head_dim": 0}, {"vocab_size": 0}, {"pad_token_id": 10**9},
                                    {"model_type": ["llama"]}, {"model_type": {}}, {"model_type": 3}], ids=str)
def test_a_configuration_that_cannot_be_built_is_refused_by_every_command(tmp_path, change, use):
    with pytest.raises(GqaExportError) as refusal:
        use(edited(tmp_path, **change))
    assert refusal.value.code in ("E-MODEL-BUILD", "E-MODEL-UNKNOWN", "E-CKPT-CONFIG")
