"""Target `onnx`: standard Attention, RotaryEmbedding and RMSNormalization."""
