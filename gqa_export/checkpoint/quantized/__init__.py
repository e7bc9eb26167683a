"""Readers of quantized checkpoints: one module a format, stored tensors in, `QuantizedMatrix` out."""
