"""A tiny Mistral (window 16, GQA 4/2) with a byte-level tokenizer, exported once per target and cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gqa_export.checkpoint.load_model import load_model

CAPACITY = 48
VOCABULARY = 320
END = 2
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' and m['content'] == 'forbidden' %}"
            "{{ raise_exception('no such system message') }}{% endif %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}")


def write_byte_tokenizer(folder: Path, **config: Any) -> None:
    """tokenizer.json with one token per byte, <s> = 1 in front of every text, </s> = 2; and its configuration."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": TEMPLATE,
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False,
                      "single_word": False, "special": True},
        **config}))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    from gqa_models import write_tiny

    folder = write_tiny("mistral", tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=2)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint) -> Any:
    from gqa_export.checkpoint.open import open_checkpoint

    return load_model(open_checkpoint(checkpoint), "float32")


@pytest.fixture(scope="session")
def bundle(checkpoint, tmp_path_factory) -> Callable[..., Path]:
    """(target, cache, logits="all") -> the folder of that export; not to be changed, see `copied`."""
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx

    made: dict[tuple[str, str, str], Path] = {}

    def make(target: str = "ort", cache: str = "growing", logits: str = "all") -> Path:
        key = (target, cache, logits)
        if key not in made:
            folder = tmp_path_factory.mktemp("bundle") / "-".join(key)
            export_onnx(checkpoint, folder, ExportOptions(target, cache=cache, capacity=CAPACITY, logits=logits))
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    """A bundle of target `ort`, growing, that a test may damage."""
    return Path(shutil.copytree(bundle(), tmp_path / "copied"))


@pytest.fixture
def edit_manifest(copied) -> Callable[..., Path]:
    """Change top-level entries of the manifest of `copied`."""
    def edit(**changes: Any) -> Path:
        path = copied / "gqa_export.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return copied

    return edit


# What a session is led through: (S, new tokens per row) of each step. The widest row passes the window of 16.
ALONE = ((9, (9,)), (1, (1,)), (12, (12,)), (1, (1,)), (1, (1,)))
RAGGED = ((19, (19, 5, 1)), (1, (1, 1, 1)), (4, (2, 4, 1)), (1, (1, 0, 1)), (1, (1, 1, 1)), (3, (0, 3, 0)),
          (1, (1, 1, 1)), (2, (0, 0, 0)), (1, (1, 1, 1)))


def drive(session, steps, seed: int = 11) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Logits and written rows of every step, zero where there is no token; the valid cache at the end, row by row."""
    random = np.random.default_rng(seed)
    session.reset(len(steps[0][1]))
    shown = []
    for width, new in steps:
        ids = random.integers(0, VOCABULARY, (len(new), width))
        step = session.step(ids, np.array(new), want_cache=True)
        real = np.arange(width)[None] < np.array(new)[:, None]
        shown.append((np.where(real[..., None], step.logits, 0),
                      [np.where(real[:, None, :, None], rows, 0) for rows in (*step.keys, *step.values)]))
    rows = [tensor[b, :, :length] for pair in session.cache() for tensor in pair
            for b, length in enumerate(session.lengths.tolist())]
    return [*shown, (np.zeros(0), rows)]


def largest_difference(one, other) -> float:
    """Between two results of `drive`."""
    worst = 0.0
    for (logits, rows), (other_logits, other_rows) in zip(one, other, strict=True):
        for a, b in zip([logits, *rows], [other_logits, *other_rows], strict=True):
            if a.size:
                worst = max(worst, float(np.abs(a.astype(np.float64) - b).max()))
    return worst
