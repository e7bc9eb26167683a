"""A checkpoint on disk (Hugging Face folder, hub id or GGUF file) -> its facts and, on demand, its torch module."""
