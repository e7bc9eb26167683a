"""Special tokens and chat templates, wherever a checkpoint keeps them: the same prompts and ids as transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from refusal import refused

from gqa_export.bundle.manifest import MANIFEST, FileFact, read_manifest
from gqa_export.errors import InvalidBundle
from gqa_export.files.sha256 import file_sha256
from gqa_export.runtime.text import BundleText

from .conftest import write_byte_tokenizer

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi <img> <far> <near>!"}]
EVERY = ("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ image_token }}|{{ eot_token }}|"
         "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}")
PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
FAR = {"content": "<far>", "special": True, **PLAIN}
NEAR = {"content": "<near>", "special": False, **PLAIN}


def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def write(folder, config, files=()):
    """The byte tokenizer, its configuration replaced, with files beside it."""
    write_byte_tokenizer(folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": EVERY, **config}
    for name, content in {"tokenizer_config.json": config, **dict(files)}.items():
        (folder / name).write_text(json.dumps(content))


CASES = {
    "nothing named": ({}, {}),
    "special_tokens_map alone": ({}, {"special_tokens_map.json": {
        "bos_token": "<s>", "eos_token": {"content": "</s>", **PLAIN}}}),
    "special_tokens_map goes first": ({"bos_token": "</s>"}, {"special_tokens_map.json": {"bos_token": "<s>"}}),
    "a decoder makes the map old": ({"bos_token": "<s>", "added_tokens_decoder": {"1": {**FAR, "content": "<s>"}}},
                                    {"special_tokens_map.json": {"bos_token": "</s>", "pad_token": "<unk>"}}),
    "extra_special_tokens by name": ({"bos_token": "<s>", "extra_special_tokens": {
        "image_token": "<img>", "eot_token": "</s>"}}, {}),
    "extra_special_tokens by name in the map": ({}, {"special_tokens_map.json": {
        "bos_token": "<s>", "extra_special_tokens": {"image_token": "<img>"}}}),
    "extra_special_tokens as a list": ({"bos_token": "<s>", "extra_special_tokens": ["<img>", "<far>"]}, {}),
    "additional_special_tokens": ({"bos_token": "<s>", "additional_special_tokens": ["<far>", "<img>"]}, {}),
    "additional_special_tokens in the map": ({"bos_token": "<s>"}, {"special_tokens_map.json": {
        "additional_special_tokens": ["<img>"]}}),
    "a token of its own name": ({"bos_token": "<s>", "image_token": "<img>"}, {}),
    "a pad token that is nowhere else": ({"bos_token": "<s>", "pad_token": "<far>"}, {}),
    "tokens of the decoder": ({"bos_token": "<s>", "added_tokens_decoder": {"260": NEAR, "259": FAR}}, {}),
    "the decoder changes the flags": ({"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": {
        "2": {**FAR, "content": "</s>", "rstrip": True}, "259": FAR}}, {}),
    "added_tokens.json": ({"bos_token": "<s>"}, {"added_tokens.json": {"<near>": 260, "<far>": 259}}),
    "added_tokens.json and the map": ({}, {"added_tokens.json": {"<far>": 259}, "special_tokens_map.json": {
        "bos_token": "<s>", "pad_token": "<far>"}}),
}


@pytest.mark.parametrize("name", CASES)
def test_prompts_and_ids_are_those_of_transformers(tmp_path, name):
    write(tmp_path, *CASES[name])
    ours, tokenizer = BundleText(tmp_path), theirs(tmp_path)
    rendered = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert ours.render_chat(MESSAGES) == rendered
    assert ours.encode_chat(MESSAGES) == tokenizer.encode(rendered, add_special_tokens=False)
    for text in ("hi </s> <far><near> <img>", "", "<s>x"):
        assert ours.encode(text) == tokenizer.encode(text)
        ids = tokenizer.encode(text)
        assert ours.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_the_prompt_of_an_old_checkpoint_has_its_begin_token(tmp_path):
    write(tmp_path, {}, {"special_tokens_map.json": {"bos_token": "<s>"}})
    assert BundleText(tmp_path).encode_chat(MESSAGES)[0] == 1


@pytest.mark.parametrize("named", ["GPTNeoXTokenizerFast", "GPTNeoXTokenizer", "PreTrainedTokenizerFast",
                                   "GPT2TokenizerFast", "LlamaTokenizerFast", None])
@pytest.mark.parametrize("model_type", ["gpt_neox", "olmo", "llama", None])
@pytest.mark.parametrize("adds", [False, True, None])
def test_a_begin_token_is_added_where_transformers_adds_it(tmp_path, named, model_type, adds):
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": named,
              "add_bos_token": adds}
    write(tmp_path, {name: value for name, value in config.items() if value is not None})
    data = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if named is None:
        del data["tokenizer_class"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(data))
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    expected = theirs(tmp_path).encode("hi")
    assert (BundleText(tmp_path).encode("hi")[0] == 1) == (expected[0] == 1), expected


NAMED = [{"name": "tool_use", "template": "T{{ tools | tojson }}{{ messages[0].content }}"},
         {"name": "rag", "template": "R{{ documents[0].text }}"}]


def test_of_several_templates_one_is_chosen_by_name_or_as_transformers_chooses(tmp_path):
    write(tmp_path, {"chat_template": [*NAMED, {"name": "default", "template": "D{{ enable_thinking }}"}]})
    ours, tokenizer = BundleText(tmp_path), theirs(tmp_path)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for template, args in ((None, {}), ("rag", {"documents": [{"text": "x"}]}), (None, {"tools": tools}),
                           (None, {"enable_thinking": False}), ("tool_use", {"tools": tools}),
                           ("default", {"tools": tools})):
        expected = tokenizer.apply_chat_template(MESSAGES, chat_template=template, add_generation_prompt=True,
                                                 tokenize=False, **args)
        assert ours.render_chat(MESSAGES, template, args) == expected


def test_several_templates_and_no_default_are_named(tmp_path):
    write(tmp_path, {"chat_template": NAMED})
    for name in (None, "other"):
        with refused("E-RUN-CHAT-TEMPLATE-NAME") as refusal:
            BundleText(tmp_path).render_chat(MESSAGES, name)
        assert "rag, tool_use" in refusal.error.what
        assert "--chat-template" in refusal.error.fix


def test_variables_reach_the_template_and_go_before_special_tokens(tmp_path):
    write(tmp_path, {"bos_token": "<s>", "chat_template": "{{ bos_token }}{{ deep.list[1] }}{{ enable_thinking }}"})
    args = {"deep": {"list": [1, 2.5]}, "enable_thinking": True, "bos_token": "B"}
    expected = theirs(tmp_path).apply_chat_template(MESSAGES, tokenize=False, **args)
    assert BundleText(tmp_path).render_chat(MESSAGES, None, args) == expected == "B2.5True"


@pytest.mark.parametrize("args", [{"messages": []}, {"chat_template": "x"}, {"add_generation_prompt": False},
                                  {"tools": 3}, {"tools": ["f"]}, {"documents": {}},
                                  {"continue_final_message": True}], ids=str)
def test_variables_that_are_the_prompt_itself_or_of_another_form_are_refused(tmp_path, args):
    write(tmp_path, {"chat_template": "x"})
    with refused("E-OPTION-TEMPLATE-ARGS"):
        BundleText(tmp_path).render_chat(MESSAGES, None, args)


def test_a_template_that_is_none_is_refused(tmp_path):
    write(tmp_path, {"chat_template": [3]})
    with refused("E-RUN-CHAT-TEMPLATE-DAMAGED", InvalidBundle):
        BundleText(tmp_path).render_chat(MESSAGES)


def test_the_command_takes_a_template_and_its_variables(copied, program):
    data = json.loads((copied / "tokenizer_config.json").read_text())
    named = [*NAMED, {"name": "thinking", "template": "{{ bos_token }}{{ 'on' if enable_thinking else 'off' }}"}]
    (copied / "tokenizer_config.json").write_text(json.dumps({**data, "chat_template": named}))
    manifest = read_manifest(copied)
    path = copied / "tokenizer_config.json"
    files = {**manifest.files, path.name: FileFact(path.stat().st_size, file_sha256(path))}
    (copied / MANIFEST).write_text(replace(manifest, files=files).to_json())
    done = program("run", copied, "--chat", "--prompt", "x", "--max-new-tokens", 1, "--json",
                   "--chat-template", "thinking", "--template-args", '{"enable_thinking": true}')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt_tokens"] == BundleText(copied)._codec.encode("<s>on", False)
    for options, code in ((("--chat", "--template-args", "[]"), "E-OPTION-TEMPLATE-ARGS"),
                          (("--chat", "--template-args", "{"), "E-OPTION-TEMPLATE-ARGS"),
                          (("--chat",), "E-RUN-CHAT-TEMPLATE-NAME"), (("--chat-template", "rag"), "E-OPTION-CHAT"),
                          (("--template-args", "{}", "--chat-template", "rag"), "E-OPTION-CHAT")):
        done = program("run", copied, "--prompt", "x", *options)
        assert (done.returncode, code in done.stderr) == (2, True), done.stderr


def test_an_answer_ends_at_an_end_that_only_the_tokenizer_names(checkpoint, tmp_path):
    """From the checkpoint into the manifest."""
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx

    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    data = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**data, "eot_token": "<unk>"}))
    export_onnx(folder, tmp_path / "bundle", ExportOptions(capacity=32))
    assert read_manifest(tmp_path / "bundle").tokens["eos"][-1] == 0
