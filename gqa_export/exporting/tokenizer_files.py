"""The tokenizer's files of a bundle: copied from the checkpoint's folder, or made from a GGUF file's metadata."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.load_config import load_config
from ..checkpoint.tokenizer import has_tokenizer, tokenizer_files
from ..errors import InvalidCheckpoint, cause_of
from ..files.scratch import scratch_folder

if TYPE_CHECKING:
    from ..bundle.writer import BundleWriter
    from ..checkpoint.checkpoint import Checkpoint


NO_TOKENIZER = "the checkpoint has no tokenizer: the bundle takes and gives token ids only"


def add_tokenizer(checkpoint: Checkpoint, writer: BundleWriter) -> str:
    """Put the tokenizer's files into a bundle.

    Returns:
        Why the bundle has no tokenizer, as a note for the user; "" if it has one.
    """
    if checkpoint.kind == "hf":
        for path in tokenizer_files(checkpoint):
            writer.copy(path, path.name)
        return "" if has_tokenizer(checkpoint) else NO_TOKENIZER
    with scratch_folder("tokenizer") as folder:
        note = _convert_gguf(checkpoint, folder)
        for path in sorted(folder.iterdir()):
            writer.copy(path, path.name)
    return note


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Read a checkpoint's tokenizer.json, before the work that a damaged one would make vain.

    Raises:
        InvalidCheckpoint: the file cannot be read as a tokenizer.
    """
    path = checkpoint.folder / "tokenizer.json"
    if checkpoint.kind != "hf" or not path.is_file():
        return
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and panics with what is not even one
        raise InvalidCheckpoint(f"the tokenizer cannot be read: {cause_of(error)}", str(path),
                                "fetch tokenizer.json again, or remove it to export for token ids only",
                                code="E-CKPT-TOKENIZER") from error


def _convert_gguf(checkpoint: Checkpoint, folder: Path) -> str:
    """Write configuration and tokenizer of a GGUF file; returns as `add_tokenizer`."""
    from transformers import AutoTokenizer, GenerationConfig

    from ..checkpoint.gguf_reader_patch import quick_gguf
    from ..checkpoint.quiet import quiet

    assert checkpoint.gguf_file is not None
    with quiet():
        config = load_config(checkpoint)
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        if not has_tokenizer(checkpoint):
            return NO_TOKENIZER
        try:
            with scratch_folder("converted") as converted, quick_gguf():
                AutoTokenizer.from_pretrained(checkpoint.folder, gguf_file=checkpoint.gguf_file.name,
                                              local_files_only=True, trust_remote_code=False).save_pretrained(converted)
                for path in converted.iterdir():
                    shutil.move(path, folder / path.name)  # scratch folders may be on another disk
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises plain Exception, and panics with what is not even one
            return ("the checkpoint has a tokenizer, which could not be converted "
                    f"({cause_of(error)}): the bundle takes and gives token ids only")
        return ""
