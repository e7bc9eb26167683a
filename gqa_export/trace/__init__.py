"""A transformers configuration -> the canonical ONNX model and the facts of each of its attention layers. No weight is
read."""
