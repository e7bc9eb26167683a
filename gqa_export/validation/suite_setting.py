"""What a suite must know of a bundle and of the checkpoint behind it, gathered where neither can hide it.

A window, or the size of chunks, that an exporter lost is in no manifest; so the checkpoint's own configuration is read
too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.manifest import Manifest
from ..checkpoint.tokenized_text import MOST_CHARACTERS
from ..compare.setting import Setting
from ..errors import GqaExportError, InvalidBundle, cause_of
from ..runtime.text import JSON, open_tokenizer

SAMPLE = ("The water of a river that reaches the sea has travelled for weeks. Most of it fell as rain, some as snow, "
          "and a little of it has been here before.")
LARGEST = 6


def setting_of(manifest: Manifest, folder: Path, steps: int, text: Path | None = None, model: Any = None) -> Setting:
    """The setting of a bundle's suite.

    Args:
        manifest, folder: of the bundle.
        steps: decode steps of each case.
        text: a UTF-8 file to measure perplexity on; None: no such case.
        model: the checkpoint's module, for its configuration and embedding; None where only bundles are compared.

    Raises:
        GqaExportError: the text cannot be read or is too short, or the bundle has no tokenizer for it.
    """
    from ..targets import get_target
    from ..trace.probe.rotary import switch_of

    special = _special(manifest)
    config = model.config.to_dict() if model is not None else {}
    avoided = special if model is None else tuple(set(special) & _own_special(model))
    switch = manifest.spec.rope_switch if model is None else switch_of(model.config.get_text_config(),
                                                                       manifest.capacity)
    return Setting(manifest.spec, manifest.capacity, steps, tuple(_windows(config)), _original_positions(config),
                   switch, special, _largest_embeddings(model, avoided) if model is not None else (),
                   encoded(folder, SAMPLE), read_text(folder, text) if text is not None else None,
                   literal=get_target(manifest.target).literal_capacity, avoided=avoided, rings=rings_of(manifest))


def rings_of(manifest: Manifest) -> tuple[tuple[int, int], ...]:
    """(slots, window) of every kind of ring among a bundle's caches."""
    windows = manifest.window_cache
    return tuple(sorted({(windows.slots(layer), layer.window) for layer in manifest.spec.layers
                         if windows.slots(layer)})) if windows else ()


def _special(manifest: Manifest) -> tuple[int, ...]:
    """Ids of the special tokens, as the manifest names them: they are fed."""
    tokens = manifest.tokens
    return tuple(_flat(tokens.get("eos"), tokens.get("bos"), tokens.get("pad")))


def _own_special(model: Any) -> set[int]:
    """Those that the checkpoint names. Random prompts avoid no others: a manifest could hide rows of the embedding."""
    configs = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
    return set(_flat(*(getattr(config, f"{name}_token_id", None) for config in configs
                       for name in ("eos", "bos", "pad"))))


def _flat(*found: Any) -> list[int]:
    return [int(i) for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids])]


def _windows(config: dict[str, Any]) -> Iterator[int]:
    """Whole numbers of a configuration, at any depth, whose name contains `window`; of one that contains
    `attention_chunk`, the ends of the first two chunks."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _windows(value)
        elif not isinstance(value, int) or isinstance(value, bool) or "layer" in name:
            continue
        elif "window" in name:
            yield value
        elif "attention_chunk" in name:
            yield from (value, 2 * value)


def _original_positions(config: dict[str, Any]) -> int:
    """`original_max_position_embeddings` of a scaled rotary, 0 if there is none."""
    rope = config.get("rope_parameters") or {}
    tables = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return max((int(table.get("original_max_position_embeddings") or 0) for table in tables), default=0)


def _largest_embeddings(model: Any, special: tuple[int, ...]) -> tuple[int, ...]:
    """Ids whose embeddings are the longest vectors, the longest first."""
    order = model.get_input_embeddings().weight.detach().float().norm(dim=1).argsort(descending=True).tolist()
    return tuple(i for i in order[: LARGEST + len(special)] if i not in special)[:LARGEST]


def encoded(folder: Path, text: str) -> np.ndarray | None:
    """Token ids of a text, None where the bundle carries no tokenizer.json."""
    if not (folder / JSON).is_file():
        return None
    try:
        return np.array(open_tokenizer(folder).encode(text, True), np.int64)
    except (GqaExportError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library panics with an exception that is not an Exception
        raise InvalidBundle(f"the tokenizer cannot encode a sentence: {cause_of(error)}", str(folder / JSON),
                            "copy it from the checkpoint again", code="E-BUNDLE-TOKENIZER") from error


def check_tokenizer(folder: Path) -> None:
    """Encode a sentence with a bundle's tokenizer.json, before the work that a damaged one would make vain.

    Raises:
        InvalidBundle: the file cannot be read, or the library fails on it.
    """
    encoded(folder, SAMPLE)


def read_text(folder: Path, path: Path) -> np.ndarray:
    """Token ids of a text file, of a very long one of its beginning, with the bundle's tokenizer.

    Raises:
        GqaExportError: the file cannot be read, its text is too short, or the bundle has no tokenizer.
    """
    try:
        with path.open(encoding="utf-8") as file:
            ids = encoded(folder, file.read(MOST_CHARACTERS))
    except (OSError, UnicodeDecodeError) as error:
        raise GqaExportError(f"the text cannot be read: {cause_of(error)}", str(path), "give a text file in UTF-8",
                             code="E-OPTION-TEXT-FILE") from error
    if ids is None:
        raise GqaExportError("--text needs a tokenizer, and the bundle has none", str(folder),
                             "leave out --text, or export a checkpoint that has a tokenizer",
                             code="E-VALIDATE-TOKENIZER")
    if len(ids) < 2:
        raise GqaExportError(f"perplexity needs at least 2 tokens, and the text has {len(ids)}", str(path),
                             "give a longer text", code="E-OPTION-TEXT-SHORT")
    return ids
