"""The special tokens of a tokenizer, by name and as tokens that tokenizer.json lacks: read from the files beside it as
transformers 5 reads them (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`), without it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CONFIG, MAP, ADDED, TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                                 "tokenizer.json")
STANDARD = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
ENDS = ("eos_token", "eot_token", "eom_token")
"""names of tokens that end an answer: of the text, of the turn, of a message that waits for a tool"""
DECODER, EXTRA, ADDITIONAL = "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
Token = dict[str, Any]
"""a token as tokenizer_config.json stores it: content, and the flags of `tokenizers.AddedToken`"""


def named_tokens(config: Mapping[str, Any], tokens_map: Mapping[str, Any]) -> dict[str, str]:
    """name -> text of the special tokens that a chat template may use. special_tokens_map.json counts where
    tokenizer_config.json has no `added_tokens_decoder`, that is, of older checkpoints, and goes first then.

    Args:
        config: tokenizer_config.json, or {}. tokens_map: special_tokens_map.json, or {}.
    """
    found = {name: value for name, value in config.items() if name.endswith("_token")
             and (name in STANDARD or isinstance(value, str))}
    found |= _named_extra(config)
    if DECODER not in config:
        found |= {name: value for name, value in tokens_map.items() if name in STANDARD}
        found |= _named_extra(tokens_map)
    return {name: text for name, value in found.items() if (text := content_of(value)) is not None}


def added_tokens(config: Mapping[str, Any], tokens_map: Mapping[str, Any], added: Mapping[str, Any]) -> Iterator[Token]:
    """Tokens that a tokenizer has beside those of tokenizer.json, in the order in which they get their ids.

    Args:
        config, tokens_map: as of `named_tokens`. added: added_tokens.json, or {}.
    """
    listed = [*_listed_extra(config), *([] if DECODER in config else _listed_extra(tokens_map))]
    names = named_tokens(config, tokens_map)
    special = {*names.values(), *filter(None, map(content_of, listed))}
    if isinstance(decoder := config.get(DECODER), dict):
        entries = [(int(number), token) for number, token in decoder.items()
                   if str(number).isdecimal() and content_of(token) is not None and isinstance(token, dict)]
        yield from (token for _, token in sorted(entries, key=lambda entry: entry[0]))
    elif DECODER not in config:
        for text, _ in sorted(((text, number) for text, number in added.items() if isinstance(number, int)),
                              key=lambda entry: entry[1]):
            yield {"content": text, "normalized": text not in special, "special": text in special}
    yield from ({"content": text, "special": True} for text in names.values())
    for token in listed:
        if (content := content_of(token)) is not None:
            yield {**(token if isinstance(token, dict) else {}), "content": content, "special": True}


def content_of(value: Any) -> str | None:
    """A token's text: stored as a string, or as a dict with its flags."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def end_token_ids(folder: Path, read: Any) -> list[int]:
    """Ids of the tokens that end an answer as the tokenizer names them. read: gives the JSON object of a file."""
    config, tokens_map, added = ({} if not (folder / name).is_file() else read(folder / name)
                                 for name in (CONFIG, MAP, ADDED))
    names = named_tokens(config, tokens_map)
    wanted = [names[name] for name in ENDS if name in names]
    ids = _ids_in(folder / TOKENIZER) if wanted else {}
    for text, number in added.items():
        ids.setdefault(text, number)
    decoder = config.get(DECODER)
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if str(number).isdecimal() and (text := content_of(token)) is not None:
            ids.setdefault(text, int(number))
    found = [ids[text] for text in wanted if isinstance(ids.get(text), int)]
    return list(dict.fromkeys(found))


def _named_extra(settings: Mapping[str, Any]) -> dict[str, Any]:
    extra = settings.get(EXTRA)
    return dict(extra) if isinstance(extra, dict) else {}


def _listed_extra(settings: Mapping[str, Any]) -> list[Any]:
    extra = settings.get(EXTRA) or settings.get(ADDITIONAL)
    return list(extra) if isinstance(extra, list) else []


def _ids_in(path: Path) -> dict[str, Any]:
    """text -> id of the tokens in a tokenizer.json; {} where there is none. It is checked elsewhere."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = data["model"].get("vocab", {})
        ids = dict(vocabulary) if isinstance(vocabulary, dict) else {entry[0]: number for number, entry
                                                                     in enumerate(vocabulary)}
        return ids | {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
        return {}
