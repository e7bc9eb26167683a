"""Target `ort`: GroupQueryAttention and the other fused operators of ONNX Runtime."""
