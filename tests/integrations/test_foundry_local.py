"""What the SDK of Foundry Local demands of a folder with a model of one's own, by its documentation (2.2).

`register_model` wants a regular `genai_config.json`, of a model that onnxruntime-genai opens; chats want a tokenizer
with a template.
"""

from __future__ import annotations

import json
from pathlib import Path

from gqa_models import write_tiny

from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx


def test_an_ort_bundle_is_a_folder_that_can_be_registered(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    checkpoint = write_tiny("llama", tmp_path / "checkpoint", num_hidden_layers=1)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "sea": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>",
                            chat_template="{{ messages[0]['content'] }}").save_pretrained(checkpoint)
    export_onnx(checkpoint, tmp_path / "bundle", ExportOptions(dtype="fp32"))
    config = tmp_path / "bundle" / "genai_config.json"
    assert config.is_file()
    assert not config.is_symlink()
    named = json.loads(config.read_text(encoding="utf-8"))["model"]["decoder"]["filename"]
    assert (config.parent / named).is_file()
    assert (config.parent / "tokenizer.json").is_file()
    assert (config.parent / "chat_template.jinja").is_file() or "chat_template" in json.loads(
        (config.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
