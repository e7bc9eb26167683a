"""A checkpoint on disk (Hugging Face folder, hub id or GGUF file) -> its facts and, on demand, its torch module."""

from __future__ import annotations

from .safetensors_header import StoredTensor, header_sha256, read_header
from .checkpoint import Checkpoint
from .open import open_checkpoint
from ..bundle.source_checkpoint import open_for

__all__ = ["Checkpoint", "StoredTensor", "header_sha256", "open_checkpoint", "open_for", "read_header"]
