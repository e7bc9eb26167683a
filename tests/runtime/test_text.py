"""Tokenizers of bundles: the same ids as transformers, whole characters only, chat templates."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused

from gqa_export.errors import InvalidBundle
from gqa_export.runtime.text import BundleText, TextStream, _Slow, has_tokenizer

from .conftest import write_byte_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> BundleText:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return BundleText(folder)


def streamed(text: BundleText, ids: list[int]) -> list[str]:
    stream = text.stream()
    return [*(stream.push(token) for token in ids), stream.flush()]


def test_a_character_comes_out_when_its_last_byte_is_there(text) -> None:
    pieces = streamed(text, text.encode("é日🙂!")[1:])
    assert pieces == ["", "é", "", "", "日", "", "", "", "🙂", "!", ""]


def test_bytes_that_never_become_a_character_come_out_at_the_end(text) -> None:
    ids = text.encode("a🙂")[1:]
    pieces = streamed(text, ids[:-1])
    assert pieces[:2] == ["a", ""]
    assert set(pieces[-1]) == {"\ufffd"}


def test_special_tokens_are_not_printed(text) -> None:
    assert "".join(streamed(text, [1, *text.encode("x")[1:], 2])) == "x"


@given(st.text(max_size=30))
def test_streamed_pieces_are_the_text(text, words) -> None:
    ids = text.encode(words)
    pieces = streamed(text, ids)
    assert "".join(pieces) == words
    assert all(piece == "" or piece in words for piece in pieces)


@given(st.lists(st.integers(3, 258), max_size=30))
def test_any_tokens_stream_to_what_decoding_them_at_once_gives(text, ids) -> None:
    assert "".join(streamed(text, ids)) == text.decode(ids)


def word_tokenizer(folder) -> None:
    """Words with a mark for the space before them, which decoding drops at the start of a text (as in Llama 2)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"▁the": 0, "▁sea": 1, "s": 2}, unk_token="s"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_space_that_decoding_drops_at_the_start_survives_in_the_middle(tmp_path) -> None:
    word_tokenizer(tmp_path)
    assert "".join(streamed(BundleText(tmp_path), [0, 1, 2])) == "the seas"


def test_the_cost_of_a_token_does_not_grow_with_the_answer(text, monkeypatch) -> None:
    stream = text.stream()
    monkeypatch.setattr(type(text._codec), "decode", lambda *_: pytest.fail("the whole answer was decoded"))
    assert [stream.push(token) for token in text.encode("x" * 100)[1:]] == ["x"] * 100


class Sentencepiece:
    """A tokenizer that transformers runs itself: bytes, a token each; it drops a space at the start."""

    def encode(self, text, add_special_tokens):
        return list(text.encode())

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace").removeprefix(" ")


@given(st.text(max_size=20))
def test_a_tokenizer_of_transformers_streams_whole_characters_too(words) -> None:
    codec = _Slow(Sentencepiece())
    stream = TextStream(codec.stepper(), codec.decode)
    pieces = [*(stream.push(token) for token in codec.encode(words, False)), stream.flush()]
    assert "".join(pieces) == words.removeprefix(" ")
    assert not any(piece.endswith("\ufffd") for piece in pieces if "\ufffd" not in words)


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_bos_token": True}, {"add_eos_token": True},
                                   {"add_bos_token": False, "add_eos_token": True}])
def test_ids_are_those_of_transformers(tmp_path, flags) -> None:
    from transformers import AutoTokenizer

    write_byte_tokenizer(tmp_path, **flags)
    assert BundleText(tmp_path).encode("a déjà") == AutoTokenizer.from_pretrained(str(tmp_path)).encode("a déjà")


def test_a_chat_is_rendered_as_transformers_renders_it(tmp_path) -> None:
    from transformers import AutoTokenizer

    write_byte_tokenizer(tmp_path)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    text = BundleText(tmp_path)
    assert text.render_chat(messages) == "<s>[system]be brief[user]hi[assistant]"
    theirs = AutoTokenizer.from_pretrained(str(tmp_path)).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False)
    assert text.encode_chat(messages) == theirs


def test_the_template_may_lie_in_its_own_file_or_under_a_name(tmp_path) -> None:
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    write_byte_tokenizer(tmp_path, chat_template=named)
    assert BundleText(tmp_path).chat_template() == "d"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "j"}))
    assert BundleText(tmp_path).chat_template() == "j"
    (tmp_path / "chat_template.jinja").write_text("own")
    assert BundleText(tmp_path).chat_template() == "own"


def test_a_conversation_that_the_template_refuses_is_bad_input(text) -> None:
    with refused("E-RUN-CHAT-REFUSED") as refusal:
        text.render_chat([{"role": "system", "content": "forbidden"}])
    assert "no such system message" in refusal.error.what
    assert "--system" in refusal.error.fix


def test_without_a_template_chat_is_refused(tmp_path) -> None:
    write_byte_tokenizer(tmp_path, chat_template=None)
    with refused("E-RUN-CHAT-TEMPLATE"):
        BundleText(tmp_path).encode_chat([{"role": "user", "content": "hi"}])


def test_a_folder_without_a_tokenizer_wants_token_ids(tmp_path) -> None:
    assert not has_tokenizer(tmp_path)
    with refused("E-RUN-TOKENIZER") as refusal:
        BundleText(tmp_path)
    assert "--token-ids" in refusal.error.fix


def test_tokenizer_files_that_cannot_be_read_are_refused(tmp_path) -> None:
    write_byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with refused("E-BUNDLE-TOKENIZER", InvalidBundle):
        BundleText(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with refused("E-BUNDLE-JSON", InvalidBundle):
        BundleText(tmp_path)


def test_another_format_goes_through_transformers(tmp_path) -> None:
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "the", "sea"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    text = BundleText(tmp_path)
    assert text.encode("the sea") == [1, 5, 6, 2]
    assert text.decode([1, 5, 6, 2]) == "the sea"


def test_another_format_that_cannot_be_read_is_refused(tmp_path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with refused("E-BUNDLE-TOKENIZER", InvalidBundle) as refusal:
        BundleText(tmp_path)
    assert "--token-ids" in refusal.error.fix
