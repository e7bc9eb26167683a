"""What an opened checkpoint is: data only. `open`, `load_config`, `load_model` and `tokenizer` work on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .safetensors_header import StoredTensor

if TYPE_CHECKING:
    from ..quantized.matrix import QuantizedMatrix
    from .lora_adapter import LoraAdapter


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Only headers were read, and neither torch nor transformers imported for a folder.

    Attributes:
        source: what the user gave.
        folder: where its files are.
        kind: "hf" or "gguf".
        gguf_file: the file of a GGUF checkpoint; of one in parts, the first.
        config: config.json (GGUF: what the file says, as config.json would say it), without a quantization that its
            weights are not in.
        stored_dtype: the float type that most bytes have, "bfloat16" (GGUF: what it is dequantized to unless stored
            plain).
        tensors: every tensor of the safetensors files that is a plain number; empty for GGUF and pickles.
        quantized: quantized weights by the name under which the checkpoint would store them if they were plain
            (GGUF: transformers' name of the parameter). Everything that is not told to keep them sees their values.
        packed: the tensors of the safetensors files that `quantized` is made of.
        quantization: how the quantized weights are described; "" if there are none.
        values_alone: of a GGUF file, parameters that it stores as codes and of which the values alone are known -> the
            types, for people.
        pickles: the pickle files, if they are allowed.
        text_only: of a multimodal model only the language model is meant.
        model: the transformers model itself where a program holds it in memory; then `folder` has everything but
            weights.
        revision: the commit of a hub id, else "".
        notes: what a user must know of how it was read.
        adapter: of LoRA, which is merged into the weights when they are loaded.
    """

    source: str
    folder: Path
    kind: str
    gguf_file: Path | None
    config: dict[str, Any] = field(repr=False)
    stored_dtype: str = "float32"
    tensors: dict[str, StoredTensor] = field(default_factory=dict, repr=False)
    quantized: dict[str, QuantizedMatrix] = field(default_factory=dict, repr=False)
    packed: dict[str, StoredTensor] = field(default_factory=dict, repr=False)
    quantization: str = ""
    values_alone: dict[str, str] = field(default_factory=dict, repr=False)
    pickles: tuple[Path, ...] = ()
    text_only: bool = False
    model: Any = field(default=None, repr=False, compare=False)
    revision: str = ""
    notes: tuple[str, ...] = ()
    adapter: LoraAdapter | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.source
