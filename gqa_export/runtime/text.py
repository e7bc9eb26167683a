"""Text in and out of a bundle: its tokenizer, its chat template, and pieces of text as tokens arrive.

`tokenizer.json` is read by the `tokenizers` library alone, which starts in a tenth of a second; only a tokenizer
in another format brings in `transformers`. The chat template is rendered by transformers' own function, without
PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import GqaExportError

JSON, CONFIG = "tokenizer.json", "tokenizer_config.json"
OTHER_FORMATS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
REPLACEMENT = "\ufffd"


class _Codec(Protocol):
    """What a tokenizer must do. `special`: let it add its begin and end tokens."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Text to ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens left out."""


class BundleText:
    """The tokenizer of a folder. `config` is its tokenizer_config.json, or {}."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.config = _read(self.folder / CONFIG)
        self._codec = _open(self.folder)

    def encode(self, text: str) -> list[int]:
        """Ids of a plain prompt, with the begin token if this tokenizer adds one."""
        return self._codec.encode(text, True)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return self._codec.decode(ids)

    def stream(self) -> TextStream:
        """A fresh incremental detokeniser."""
        return TextStream(self._codec.decode)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation (dicts of role and content) up to where the assistant's answer begins."""
        return self._codec.encode(self.render_chat(messages), False)

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation as text. Raises GqaExportError if there is no template or it refuses the messages."""
        template = self.chat_template()
        if not template:
            raise GqaExportError("this model has no chat template", str(self.folder), "leave out --chat")
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        names: dict[str, Any] = {name: _content(value) for name, value in self.config.items()
                                 if name.endswith("_token")}
        try:
            # one conversation in; its text comes out, and the spans of the answers, which are not used
            rendered: Any = render_jinja_template([list(messages)], chat_template=template,
                                                  add_generation_prompt=True,
                                                  **{name: text for name, text in names.items() if text is not None})
        except TemplateError as error:
            raise GqaExportError(f"the chat template refuses this conversation: {error}", str(self.folder),
                                 "try without --system") from error
        return str(rendered[0][0])

    def chat_template(self) -> str:
        """The template's source, from its own file or from tokenizer_config.json; "" if there is none."""
        own = self.folder / "chat_template.jinja"
        if own.is_file():
            return own.read_text(encoding="utf-8")
        found = _read(self.folder / "chat_template.json").get("chat_template") or self.config.get("chat_template") or ""
        if isinstance(found, list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in found}
            return str(named.get("default", ""))
        return str(found)


class TextStream:
    """Text as tokens arrive. A character whose bytes are spread over several tokens comes out when it is whole.

    Decoding starts two emissions back, so that what a tokenizer does at the start of a text (dropping a space)
    does not happen in the middle of one, and the cost of a token does not grow with the length of the answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that this token completes; "" if it ends inside a character."""
        self._ids.append(token)
        text = self._unshown()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character, as U+FFFD."""
        text = self._unshown()
        self._advance()
        return text

    def _unshown(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._shown])):]

    def _advance(self) -> None:
        self._ids = self._ids[self._shown:]
        self._shown = len(self._ids)


class _Fast:
    """`tokenizers` on tokenizer.json. Which special tokens frame a text is that file's word alone, as transformers 5
    has it: `add_bos_token` and `add_eos_token` of tokenizer_config.json are left over from other formats."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise GqaExportError(f"the tokenizer cannot be read: {error}", str(path),
                                 "copy it from the checkpoint again, or use --token-ids") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, special: bool) -> list[int]:
        """Text to ids."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class _Slow:
    """transformers' AutoTokenizer, for formats without a tokenizer.json."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise GqaExportError(f"the tokenizer cannot be read: {str(error).strip().splitlines()[0]}", str(folder),
                                 "use --token-ids") from error

    def encode(self, text: str, special: bool) -> list[int]:
        """Text to ids."""
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def has_tokenizer(folder: Path | str) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((Path(folder) / name).is_file() for name in (JSON, *OTHER_FORMATS)) or any(
        Path(folder).glob("*.tiktoken"))


def _open(folder: Path) -> _Codec:
    if (folder / JSON).is_file():
        return _Fast(folder / JSON)
    if not has_tokenizer(folder):
        raise GqaExportError("this bundle has no tokenizer: its checkpoint had none", str(folder),
                             "pass the prompt as --token-ids 1,2,3")
    return _Slow(folder)


def _content(value: Any) -> str | None:
    """A special token's text: stored as a string, or as a dict with its flags."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, {} if the file is not there."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GqaExportError(f"not valid JSON: {error}", str(path),
                             "copy the file from the checkpoint again") from error
    return data if isinstance(data, dict) else {}
