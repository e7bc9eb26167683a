"""The files beside the weights: tokenizer, chat template, generation configuration, special tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..bundle.writer import BundleWriter
    from .checkpoint import Checkpoint

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
              "spiece.model", "sentencepiece.bpe.model", "tekken.json")  # fmt: skip
BESIDE = ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
          "added_tokens.json", "chat_template.jinja", "chat_template.json")  # fmt: skip


def tokenizer_files(checkpoint: Checkpoint) -> list[Path]:
    """See `Checkpoint.tokenizer_files`. A GGUF file has none: everything is inside it."""
    if checkpoint.kind == "gguf":
        return []
    named = [checkpoint.folder / name for name in TOKENIZERS + BESIDE]
    return [path for path in named if path.is_file()] + sorted(checkpoint.folder.glob("*.tiktoken"))


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """See `Checkpoint.has_tokenizer`."""
    if checkpoint.gguf_file is not None:
        from .gguf_header import read_gguf_header

        return "tokenizer.ggml.model" in read_gguf_header(checkpoint.gguf_file).metadata
    return any(path.name in TOKENIZERS or path.suffix == ".tiktoken" for path in tokenizer_files(checkpoint))


def add_tokenizer(checkpoint: Checkpoint, writer: BundleWriter) -> bool:
    """See `Checkpoint.add_tokenizer`."""
    if checkpoint.kind == "hf":
        for path in tokenizer_files(checkpoint):
            writer.copy(path, path.name)
        return has_tokenizer(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        converted = _convert_gguf(checkpoint, Path(folder))
        for path in sorted(Path(folder).iterdir()):
            writer.copy(path, path.name)
    return converted


def _convert_gguf(checkpoint: Checkpoint, folder: Path) -> bool:
    from transformers import AutoTokenizer, GenerationConfig

    from .gguf_reader_patch import quick_gguf
    from .quiet import quiet

    assert checkpoint.gguf_file is not None
    with quiet(), quick_gguf(vocabulary=True):
        config = checkpoint.load_config()
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        if not has_tokenizer(checkpoint):
            return False
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, gguf_file=checkpoint.gguf_file.name)
        except (ValueError, KeyError, NotImplementedError):  # a kind of tokenizer that transformers cannot convert
            return False
        tokenizer.save_pretrained(folder)
        return True


def token_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """See `Checkpoint.token_ids`."""
    path = checkpoint.folder / "generation_config.json"
    generation: dict[str, Any] = {}
    if checkpoint.kind == "hf" and path.is_file():
        from ..files.read_json import _read_json

        generation = _read_json(path)
    found = {}
    for name in ("eos", "bos", "pad"):
        value = generation.get(f"{name}_token_id")
        found[name] = checkpoint.config.get(f"{name}_token_id") if value is None else value
    eos = found["eos"]
    found["eos"] = [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
    return found
