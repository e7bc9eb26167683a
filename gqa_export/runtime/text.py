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

from ..errors import GqaExportError, InvalidBundle, cause_of

JSON, CONFIG = "tokenizer.json", "tokenizer_config.json"
OTHER_FORMATS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
REPLACEMENT = "\ufffd"


class Codec(Protocol):
    """What a tokenizer must do."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Text to ids. special: let it add its begin and end tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens left out."""

    def stepper(self) -> Callable[[int], str | None]:
        """A fresh function from the next id to the text that it completes, None inside a character."""


class BundleText:
    """The tokenizer of a folder. `config` is its tokenizer_config.json, or {}."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.config = _read(self.folder / CONFIG)
        self._codec = open_tokenizer(self.folder)

    def encode(self, text: str) -> list[int]:
        """Ids of a plain prompt, with the begin token if this tokenizer adds one."""
        return self._codec.encode(text, True)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return self._codec.decode(ids)

    def stream(self) -> TextStream:
        """A fresh incremental detokeniser."""
        return TextStream(self._codec.stepper(), self._codec.decode)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation (dicts of role and content) up to where the assistant's answer begins."""
        return self._codec.encode(self.render_chat(messages), False)

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation as text. Raises GqaExportError if there is no template or it refuses the messages."""
        template = self.chat_template()
        if not template:
            raise GqaExportError("this model has no chat template", str(self.folder), "leave out --chat",
                                 code="E-RUN-CHAT-TEMPLATE")
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
                                 "try without --system", code="E-RUN-CHAT-REFUSED") from error
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

    Args:
        step: gives the text that a token completes, None inside a character.
        decode: text of all ids, for what is left at the end.
    """

    def __init__(self, step: Callable[[int], str | None], decode: Callable[[Sequence[int]], str]) -> None:
        self._step, self._decode = step, decode
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that this token completes; "" if it ends inside a character."""
        self._ids.append(token)
        text = self._step(token) or ""
        self._shown += len(text)
        return text

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character, as U+FFFD."""
        text = self._decode(self._ids)[self._shown:]
        self._shown += len(text)
        return text


class _Fast:
    """A tokenizer of the `tokenizers` library. Which special tokens frame a text is that library's word alone, as
    transformers 5 has it: `add_bos_token` and `add_eos_token` of tokenizer_config.json are left over from other
    formats."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def encode(self, text: str, special: bool) -> list[int]:
        """Text to ids."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stepper(self) -> Callable[[int], str | None]:
        """See `Codec.stepper`."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token)


class _Slow:
    """A tokenizer of transformers that the `tokenizers` library does not have, such as one of sentencepiece."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, special: bool) -> list[int]:
        """Text to ids."""
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def stepper(self) -> Callable[[int], str | None]:
        """See `Codec.stepper`. Every step decodes the whole answer: these tokenizers cannot go on from a middle."""
        ids: list[int] = []
        shown = ""

        def step(token: int) -> str | None:
            nonlocal shown
            ids.append(token)
            text = self.decode(ids)
            if text.endswith(REPLACEMENT) or not text.startswith(shown):
                return None
            piece, shown = text[len(shown):], text
            return piece

        return step


def has_tokenizer(folder: Path | str) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((Path(folder) / name).is_file() for name in (JSON, *OTHER_FORMATS)) or any(
        Path(folder).glob("*.tiktoken"))


def open_tokenizer(folder: Path | str) -> Codec:
    """The tokenizer of a folder: tokenizer.json by the `tokenizers` library alone, other formats by transformers.

    Raises:
        InvalidBundle: the files of the tokenizer cannot be read.
        GqaExportError: the folder has none.
    """
    folder = Path(folder)
    if (folder / JSON).is_file():
        from tokenizers import Tokenizer

        try:
            return _Fast(Tokenizer.from_file(str(folder / JSON)))
        except Exception as error:  # the library raises plain Exception
            raise InvalidBundle(f"the tokenizer cannot be read: {cause_of(error)}", str(folder / JSON),
                                "copy it from the checkpoint again, or use --token-ids",
                                code="E-BUNDLE-TOKENIZER") from error
    if not has_tokenizer(folder):
        raise GqaExportError("this bundle has no tokenizer: its checkpoint had none, or none that could be "
                             "converted", str(folder),
                             "pass the prompt as --token-ids 1,2,3", code="E-RUN-TOKENIZER")
    from ..checkpoint.tokenized_text import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except GqaExportError as error:
        raise InvalidBundle(f"the tokenizer cannot be read: {error.what}", str(folder),
                            "copy its files from the checkpoint again, or use --token-ids",
                            code="E-BUNDLE-TOKENIZER") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _Slow(tokenizer) if backend is None else _Fast(backend)


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
        raise InvalidBundle(f"not valid JSON: {error}", str(path), "copy the file from the checkpoint again",
                            code="E-BUNDLE-JSON") from error
    return data if isinstance(data, dict) else {}
