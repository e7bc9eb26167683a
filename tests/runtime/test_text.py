"""Tokenizers of bundles: the same ids as transformers, whole characters only, chat templates."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_export.errors import GqaExportError
from gqa_export.runtime.text import BundleText, TextStream, has_tokenizer

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


def test_a_space_that_decoding_drops_at_the_start_survives_in_the_middle() -> None:
    words = {1: " the", 2: " sea", 3: "s"}
    stream = TextStream(lambda ids: "".join(words[i] for i in ids).removeprefix(" "))
    assert [stream.push(token) for token in (1, 2, 3)] == ["the", " sea", "s"]


def test_the_cost_of_a_token_does_not_grow_with_the_answer() -> None:
    longest = 0

    def decode(ids) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return "x" * len(ids)

    stream = TextStream(decode)
    for _ in range(100):
        assert stream.push(0) == "x"
    assert longest <= 2


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
    with pytest.raises(GqaExportError, match="no such system message") as refused:
        text.render_chat([{"role": "system", "content": "forbidden"}])
    assert "--system" in refused.value.fix


def test_without_a_template_chat_is_refused(tmp_path) -> None:
    write_byte_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(GqaExportError, match="no chat template"):
        BundleText(tmp_path).encode_chat([{"role": "user", "content": "hi"}])


def test_a_folder_without_a_tokenizer_wants_token_ids(tmp_path) -> None:
    assert not has_tokenizer(tmp_path)
    with pytest.raises(GqaExportError, match="no tokenizer") as refused:
        BundleText(tmp_path)
    assert "--token-ids" in refused.value.fix


def test_tokenizer_files_that_cannot_be_read_are_refused(tmp_path) -> None:
    write_byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(GqaExportError, match="tokenizer cannot be read"):
        BundleText(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(GqaExportError, match="not valid JSON"):
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
    with pytest.raises(GqaExportError, match="tokenizer cannot be read") as refused:
        BundleText(tmp_path)
    assert "--token-ids" in refused.value.fix
