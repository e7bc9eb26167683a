"""The files beside the weights: tokenizer, chat template, generation configuration, special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
              "spiece.model", "sentencepiece.bpe.model", "tekken.json")  # fmt: skip
BESIDE = ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
          "added_tokens.json", "chat_template.jinja", "chat_template.json")  # fmt: skip


def tokenizer_files(checkpoint: Checkpoint) -> list[Path]:
    """Tokenizer, chat template, generation configuration and config.json, as far as the folder has them; nothing for a
    GGUF file, which has everything inside it."""
    if checkpoint.kind == "gguf":
        return []
    named = [checkpoint.folder / name for name in TOKENIZERS + BESIDE]
    return [path for path in named if path.is_file()] + sorted(checkpoint.folder.glob("*.tiktoken"))


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether there is a tokenizer among those files (GGUF: in its metadata)."""
    if checkpoint.gguf_file is not None:
        from .gguf_header import read_gguf_header

        return "tokenizer.ggml.model" in read_gguf_header(checkpoint.gguf_file).metadata
    return any(path.name in TOKENIZERS or path.suffix == ".tiktoken" for path in tokenizer_files(checkpoint))


def token_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """Ids of the special tokens; generation_config.json goes before config.json.

    Returns:
        {"eos": list of ids, "bos": id or None, "pad": id or None}.
    """
    path = checkpoint.folder / "generation_config.json"
    generation: dict[str, Any] = {}
    if checkpoint.kind == "hf" and path.is_file():
        from ..files.read_json import read_json

        generation = read_json(path)
    found = {}
    for name in ("eos", "bos", "pad"):
        value = generation.get(f"{name}_token_id")
        found[name] = checkpoint.config.get(f"{name}_token_id") if value is None else value
    eos = found["eos"]
    found["eos"] = [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
    return found
