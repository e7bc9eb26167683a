"""What a checkpoint is, whatever its folder is called: a digest of its configuration and of every weight."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.sha256 import READ_BYTES, files_sha256
from .checkpoint import Checkpoint
from .tokenizer import tokenizer_files

if TYPE_CHECKING:
    from .safetensors_header import StoredTensor

VOLATILE = ("_name_or_path", "transformers_version")
"""fields of config.json that name where a model came from, not what it is"""


def model_digest(checkpoint: Checkpoint) -> str:
    """sha256 over the configuration and every tensor: name, type, shape and bytes. The same tensors in other files (one
    or several shards) have the same digest, where they are in safetensors."""
    config = {key: value for key, value in checkpoint.config.items() if key not in VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    if checkpoint.model is not None:
        _of_module(checkpoint.model, digest)
    elif checkpoint.gguf_file is not None or checkpoint.pickles:
        files = [checkpoint.gguf_file] if checkpoint.gguf_file is not None else sorted(checkpoint.pickles)
        digest.update(files_sha256(files).encode())
    else:
        stored = {**checkpoint.tensors, **checkpoint.packed}
        digest.update(checkpoint.quantization.encode())
        for name in sorted(stored):
            _of_tensor(name, stored[name], digest)
    if checkpoint.adapter is not None:
        for name, module in checkpoint.adapter.modules.items():
            digest.update(json.dumps([name, module.scale]).encode())
            _of_tensor(f"{name} A", module.a, digest)
            _of_tensor(f"{name} B", module.b, digest)
    return digest.hexdigest()


def tokenizer_digest(checkpoint: Checkpoint) -> str:
    """sha256 over the files that decide how a text becomes ids; config.json and generation settings are not of them."""
    beside = ("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json")
    files = [path for path in tokenizer_files(checkpoint) if path.name not in beside]
    return hashlib.sha256(json.dumps([[path.name, files_sha256([path])] for path in files]).encode()).hexdigest()


def _of_tensor(name: str, tensor: StoredTensor, digest: Any) -> None:
    digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
    with open(Path(tensor.path), "rb") as file:
        file.seek(tensor.offset)
        left = tensor.nbytes
        while left and (block := file.read(min(left, READ_BYTES))):
            digest.update(block)
            left -= len(block)


def _of_module(model: Any, digest: Any) -> None:
    import torch

    for name, tensor in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
