"""Text in and out of a bundle: its tokenizer, its chat template, and pieces of text as tokens arrive.

`tokenizer.json` is read by the `tokenizers` library alone, which starts in a tenth of a second; only a tokenizer
in another format brings in `transformers`. The chat template is rendered by transformers' own function, without
PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..checkpoint.special_tokens import ADDED, CONFIG, FLAGS, MAP, Token, added_tokens, named_tokens
from ..errors import GqaExportError, InvalidBundle, cause_of
from .chat import choose_template, render

JSON = "tokenizer.json"
OTHER_FORMATS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
REPLACEMENT = "\ufffd"
FRAME_ANEW = ("GPTNeoXTokenizer",)
"""classes of transformers that replace the post-processor of tokenizer.json by one without special tokens"""
FRAME_ANEW_TYPES = ("gpt_neox", "mpt", "olmo", "olmoe")
"""model types for which AutoTokenizer takes such a class, unless tokenizer_config.json names another"""


class Codec(Protocol):
    """What a tokenizer must do."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Text to ids. special: let it add its begin and end tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens left out."""

    def stepper(self) -> Callable[[int], str | None]:
        """A fresh function from the next id to the text that it completes, None inside a character."""


class BundleText:
    """The tokenizer of a folder. `config` is its tokenizer_config.json, or {}; `tokens` its special tokens by name."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.config = _read(self.folder / CONFIG)
        self.tokens = named_tokens(self.config, _read(self.folder / MAP))
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

    def encode_chat(self, messages: Sequence[Mapping[str, str]], template: str | None = None,
                    args: Mapping[str, Any] | None = None) -> list[int]:
        """Ids of a conversation (dicts of role and content) up to where the assistant's answer begins. Arguments as of
        `render_chat`."""
        return self._codec.encode(self.render_chat(messages, template, args), False)

    def render_chat(self, messages: Sequence[Mapping[str, str]], template: str | None = None,
                    args: Mapping[str, Any] | None = None) -> str:
        """The conversation as text.

        Args:
            messages: dicts of role and content.
            template: name of the template; None is the default one (tool_use where `args` has tools).
            args: variables for the template, such as tools or enable_thinking.

        Raises:
            GqaExportError: there is no such template, or it refuses the messages.
        """
        return render(self.chat_template(template, args or {}), messages, self.tokens, args or {}, self.folder)

    def chat_template(self, name: str | None = None, args: Mapping[str, Any] | None = None) -> str:
        """The template's source, from its own file or from tokenizer_config.json."""
        own = self.folder / "chat_template.jinja"
        stored = _read_text(own) if own.is_file() else \
            _read(self.folder / "chat_template.json").get("chat_template") or self.config.get("chat_template")
        return choose_template(stored, name, args or {}, self.folder)


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
    formats. framed: False where transformers' class makes the frame anew, without any token."""

    def __init__(self, tokenizer: Any, framed: bool = True) -> None:
        self._tokenizer, self._framed = tokenizer, framed
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def encode(self, text: str, special: bool) -> list[int]:
        """Text to ids."""
        return list(self._tokenizer.encode(text, add_special_tokens=special and self._framed).ids)

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

        config, tokens_map, added = (_read(folder / name) for name in (CONFIG, MAP, ADDED))
        try:
            tokenizer = Tokenizer.from_file(str(folder / JSON))
            _add_tokens(tokenizer, list(added_tokens(config, tokens_map, added)),
                        set(named_tokens(config, tokens_map).values()))
            return _Fast(tokenizer, framed=not _frames_anew(folder, config))
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


def _add_tokens(tokenizer: Any, tokens: Sequence[Token], named: Collection[str]) -> None:
    """Add those that are not there, or have other flags there, as transformers does. named: special by their names."""
    from tokenizers import AddedToken

    here = {token.content: repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    for token in tokens:
        text = token["content"]
        made = AddedToken(text, **{flag: bool(token[flag]) for flag in FLAGS if flag in token})
        if text not in here or ("normalized" in token and here[text] != repr(made)):
            here[text] = repr(made)
            made.special = made.special or text in named
            tokenizer.add_tokens([made])


def _frames_anew(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether transformers' class of this tokenizer ignores the frame that tokenizer.json has."""
    name = config.get("tokenizer_class")
    if not isinstance(name, str):
        kind = _read(folder / "config.json").get("model_type")
        return isinstance(kind, str) and kind in FRAME_ANEW_TYPES
    return name.removesuffix("Fast") in FRAME_ANEW


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, {} if the file is not there."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(_read_text(path))
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise InvalidBundle(f"not valid JSON: {error}", str(path), "copy the file from the checkpoint again",
                            code="E-BUNDLE-JSON") from error
    return data


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidBundle(f"the file is not UTF-8: {error}", str(path), "copy the file from the checkpoint again",
                            code="E-BUNDLE-JSON") from error
