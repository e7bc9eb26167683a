"""A byte tokenizer and a few sentences, for tests that need text and no download."""

from __future__ import annotations

import json
from pathlib import Path

SENTENCES = ("The king rode out at dawn; nobody saw him return. ", "Bread, salt and a little light were all they had. ",
             "Why would a river ask the sea for water? ", "Seven ships left, and three of them came home. ")


def byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes, into a checkpoint folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
