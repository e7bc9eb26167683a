"""The files beside the weights: tokenizer, chat template, generation configuration, special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidCheckpoint
from .special_tokens import end_token_ids

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

MOST_TOKENS = 1 << 31

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
    """Ids of the special tokens. An answer ends at any token that generation_config.json, config.json, its text section
    or the tokenizer (eos, eot, eom) names as an end; bos and pad are those of the first file that has one. Defaults of
    a configuration class do not count: transformers' `generate` does not stop at them either.

    Returns:
        {"eos": list of ids, "bos": id or None, "pad": id or None}.

    Raises:
        InvalidCheckpoint: a file is not valid JSON, or an id is not one.
    """
    from ..files.read_json import read_json

    folder = checkpoint.folder
    path = folder / "generation_config.json"
    generation = read_json(path) if checkpoint.kind == "hf" and path.is_file() else {}
    places = [(path, generation)]
    places += [(folder / "config.json", place) for place in (checkpoint.config, *_text_sections(checkpoint.config))]
    found = {name: [_ids(file, f"{name}_token_id", place) for file, place in places] for name in ("eos", "bos", "pad")}
    eos = [number for ids in found["eos"] for number in ids]
    if checkpoint.kind == "hf":
        eos += end_token_ids(folder, read_json)
    first = {name: next((ids for ids in found[name] if ids), [None]) for name in ("bos", "pad")}
    return {"eos": list(dict.fromkeys(eos)), **{name: ids[0] if len(ids) == 1 else ids for name, ids in first.items()}}


def _ids(file: Path, key: str, settings: dict[str, Any]) -> list[int]:
    """The ids under a key: one, or a list; a negative one stands for none."""
    value = settings.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for number in ids:
        if isinstance(number, bool) or not isinstance(number, int) or number >= MOST_TOKENS:
            raise InvalidCheckpoint(f"{key} is {str(value)[:80]}, expected a token id or a list of them", str(file),
                                    "correct the file, or download it again", code="E-CKPT-TOKEN-ID")
    return [number for number in ids if number >= 0]


def _text_sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections of a multimodal configuration that describe its language model, outer ones first; they may be
    nested (Qwen-Omni: thinker_config.text_config)."""
    found = []
    for key in ("text_config", "decoder", "generator", "thinker_config", "llm_config", "language_config"):
        if isinstance(section := config.get(key), dict):
            found += [section, *_text_sections(section)]
    return found
