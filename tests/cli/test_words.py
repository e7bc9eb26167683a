"""Words of other tools: understood where they mean one thing, answered with the nearest word elsewhere."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from gqa_models import write_tiny

from gqa_export.cli import VERBS, main
from gqa_export.cli.words import DTYPE, TARGET, VERB_OF


@pytest.mark.parametrize(("word", "verb"), [("export", "onnx"), ("generate", "run"), ("valdate", "validate")])
def test_a_command_of_another_tool_is_answered_with_ours(word, verb):
    result = CliRunner().invoke(main, [word, "x"])
    assert result.exit_code == 2
    assert f"did you mean {verb!r}" in result.output


def test_every_verb_that_is_suggested_exists():
    assert set(VERB_OF.values()) <= set(VERBS)
    assert not set(VERB_OF) & set(VERBS)


@pytest.mark.parametrize(("word", "meant"), [("float16", "fp16"), ("FLOAT32", "fp32"), ("bfloat16", "bf16"),
                                             ("fp32", "fp32")])
def test_a_number_format_may_be_spelt_as_pytorch_does(word, meant):
    assert DTYPE.convert(word, None, None) == meant


def test_spellings_are_of_words_that_exist():
    for choice in (DTYPE, TARGET):
        assert set(choice.spellings.values()) <= set(choice.choices)


@pytest.mark.parametrize(("option", "word", "hint"), [
    ("--dtype", "int4", "--quantize int4"), ("--target", "tensorrt", "trt-plugin or trt-native"),
    ("--target", "portabel", "did you mean portable")])
def test_a_word_that_is_not_offered_says_what_is(tmp_path, option, word, hint):
    result = CliRunner().invoke(main, ["onnx", str(tmp_path), "-o", str(tmp_path / "out"), option, word])
    assert result.exit_code == 2
    assert hint in result.output
    assert not (tmp_path / "out").exists()


def test_an_export_takes_the_spelling(tmp_path):
    folder = write_tiny("llama", tmp_path / "llama")
    result = CliRunner().invoke(main, ["onnx", str(folder), "-o", str(tmp_path / "out"), "--dtype", "float16",
                                       "--no-validate"])
    assert result.exit_code == 0, result.output
    assert "float16" in result.output
