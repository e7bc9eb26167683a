"""`gqa-export run` and `gqa-export bench`, as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from gqa_export.cli import main
from gqa_export.runtime.generate import generate
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.runtime.text import BundleText

from .conftest import CAPACITY, END


def call(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_run_streams_the_answer_and_says_how_fast(bundle) -> None:
    folder = bundle()
    done = call("run", folder, "--prompt", "the sea", "--max-new-tokens", 12)
    text = BundleText(folder)
    tokens = generate(OrtSession.load(folder, "cpu"), [text.encode("the sea")], 12, [END]).tokens[0]
    assert done.exit_code == 0, done.output
    assert done.stdout == text.decode(tokens) + "\n"
    assert "prompt 8 tokens" in done.stderr
    assert "tokens/s" in done.stderr
    assert "stopped: " in done.stderr


def test_run_json_holds_tokens_text_and_speed(bundle) -> None:
    done = call("run", bundle("ort", "static"), "--token-ids", "5, 6 7", "--max-new-tokens", 4, "--json")
    shown = json.loads(done.stdout)
    assert shown["prompt_tokens"] == [5, 6, 7]
    assert len(shown["tokens"]) == 4
    assert shown["text"] == BundleText(bundle()).decode(shown["tokens"])
    assert shown["finish"] == "token limit"
    assert shown["decode_tokens_per_s"] > 0


def test_run_chat_puts_the_prompt_into_the_template(bundle) -> None:
    folder = bundle()
    done = call("run", folder, "--chat", "--system", "s", "--prompt", "q", "--max-new-tokens", 1, "--json")
    shown = json.loads(done.stdout)
    assert shown["prompt_tokens"] == BundleText(folder).encode_chat(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}])


def test_run_without_a_tokenizer_takes_and_prints_token_ids(copied) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    manifest = json.loads((copied / "gqa_export.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        manifest["files"].pop(name)
    (copied / "gqa_export.json").write_text(json.dumps(manifest))
    refused = call("run", copied, "--prompt", "hello")
    assert refused.exit_code == 2
    assert "--token-ids" in refused.stderr
    done = call("run", copied, "--token-ids", "5,6,7", "--max-new-tokens", 3)
    assert done.exit_code == 0
    assert len([int(word) for word in done.stdout.split()]) == 3


def test_a_full_cache_is_said_with_the_remedy(bundle) -> None:
    done = call("run", bundle(), "--token-ids", ",".join("7" * CAPACITY), "--max-new-tokens", 5)
    assert done.exit_code == 0
    assert "stopped: cache full" in done.stderr
    assert "--capacity" in done.stderr


@pytest.mark.parametrize(("arguments", "code"), [
    (["--prompt", "x" * CAPACITY], "E-RUN-CAPACITY"),
    (["--token-ids", "1,2,x"], "E-OPTION-TOKEN-IDS"),
    (["--token-ids", "1,9999"], "E-RUN-VOCABULARY"),
    (["--token-ids", ""], "E-RUN-PROMPT"),
    ([], "E-OPTION-PROMPT"),
    (["--prompt", "a", "--token-ids", "1"], "E-OPTION-PROMPT"),
    (["--token-ids", "1", "--chat"], "E-OPTION-CHAT"),
    (["--prompt", "a", "--system", "b"], "E-OPTION-CHAT"),
    (["--prompt", "a", "--temperature", "-1"], "E-OPTION-SAMPLING"),
    (["--prompt", "a", "--max-new-tokens", "0"], "E-OPTION-MAX-NEW-TOKENS"),
])
def test_bad_input_to_run_ends_with_exit_code_2_and_a_fix(bundle, arguments, code) -> None:
    done = call("run", bundle(), *arguments)
    assert done.exit_code == 2, done.output
    assert code in done.stderr
    assert "fix: " in done.stderr
    assert "Traceback" not in done.output


def test_run_starts_without_pytorch(bundle) -> None:
    program = ("import sys; from gqa_export.cli import main; main(sys.argv[1:], standalone_mode=False); "
               "sys.exit(1 if {'torch', 'transformers', 'onnx'} & sys.modules.keys() else 0)")
    arguments = ["run", str(bundle()), "--prompt", "a", "--max-new-tokens", "2"]
    done = subprocess.run([sys.executable, "-c", program, *arguments],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bench_prints_a_table_and_writes_its_figures(bundle, tmp_path) -> None:
    figures = tmp_path / "speed.json"
    done = call("bench", bundle("ort", "static"), "--prompt-tokens", 8, "--new-tokens", 4, "--batch", 2, "--repeat", 1,
                "--json", figures)
    assert done.exit_code == 0, done.output
    for word in ("load", "prefill", "decode", "peak memory"):
        assert word in done.stdout
    shown = json.loads(figures.read_text())
    assert len(shown["decode"]) == 1
    assert min(shown["load_s"], shown["prefill_tokens_per_s"], shown["decode_tokens_per_s"]) > 0
    # two rows give two tokens a step
    assert shown["decode_tokens_per_s"] == pytest.approx(2000 / shown["decode_step_ms"], rel=1e-6)


def test_bench_writes_only_json_to_standard_output_when_asked(bundle) -> None:
    done = call("bench", bundle(), "--prompt-tokens", 4, "--new-tokens", 2, "--repeat", 1, "--json", "-")
    assert json.loads(done.stdout)["prompt_tokens"] == 4


def test_bench_that_does_not_fit_the_cache_is_refused(bundle) -> None:
    done = call("bench", bundle(), "--prompt-tokens", CAPACITY, "--new-tokens", 2)
    assert done.exit_code == 2
    assert "E-RUN-CAPACITY" in done.stderr
    assert str(CAPACITY) in done.stderr
