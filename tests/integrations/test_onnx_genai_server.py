"""onnx-genai-server, where it is installed: four chats of different lengths at once get what each gets alone.

The command `onnx-genai` (pip install onnx-genai-server, best in an environment of its own) is looked for in PATH.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gqa_models import write_tiny

from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx

QUESTIONS = ("a", "the sea is", "one two three four five six seven", "why")
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
NEW_TOKENS = 24


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """An `ort` bundle of a tiny model with a byte-level tokenizer and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    checkpoint = write_tiny("llama", tmp_path / "checkpoint", num_hidden_layers=2)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE).save_pretrained(checkpoint)
    export_onnx(checkpoint, tmp_path / "tiny", ExportOptions(dtype="fp32"))
    return tmp_path / "tiny"


def ask(address: str, question: str) -> str:
    """The answer of the server's chat endpoint, greedy."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": question}], "max_tokens": NEW_TOKENS,
            "temperature": 0}
    request = urllib.request.Request(f"http://{address}/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://{address}/v1/models", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)


def test_four_chats_at_once_get_what_each_gets_alone(bundle: Path, tmp_path: Path) -> None:
    program = shutil.which("onnx-genai")
    if program is None:
        pytest.skip("onnx-genai is not in PATH: pip install onnx-genai-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([program, "serve", str(bundle), "--addr", address], stdout=log, stderr=log)
        try:
            wait_for(address, server)
            alone = [ask(address, question) for question in QUESTIONS]
            with ThreadPoolExecutor(len(QUESTIONS)) as pool:
                together = list(pool.map(lambda question: ask(address, question), QUESTIONS))
        finally:
            server.terminate()
            server.wait(timeout=30)
    assert together == alone, (tmp_path / "log").read_text(encoding="utf-8", errors="replace")[-3000:]
    assert len(set(alone)) > 1, "the answers depend on the questions"
