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
    """Ids of the special tokens, from generation_config.json, else from config.json, else from its text section.
    Defaults of a configuration class do not count: transformers' `generate` does not stop at them either.

    Returns:
        {"eos": list of ids, "bos": id or None, "pad": id or None}.
    """
    path = checkpoint.folder / "generation_config.json"
    generation: dict[str, Any] = {}
    if checkpoint.kind == "hf" and path.is_file():
        from ..files.read_json import read_json

        generation = read_json(path)
    places = [generation, checkpoint.config, *_text_sections(checkpoint.config)]
    found = {name: next((value for place in places if (value := place.get(f"{name}_token_id")) is not None), None)
             for name in ("eos", "bos", "pad")}
    eos = found["eos"]
    return {**found, "eos": [] if eos is None else list(eos) if isinstance(eos, list) else [eos]}


def _text_sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections of a multimodal configuration that describe its language model, outer ones first; they may be
    nested (Qwen-Omni: thinker_config.text_config)."""
    found = []
    for key in ("text_config", "decoder", "generator", "thinker_config", "llm_config", "language_config"):
        if isinstance(section := config.get(key), dict):
            found += [section, *_text_sections(section)]
    return found
