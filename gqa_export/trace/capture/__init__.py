"""The recorded run of a decoder, translated to the canonical ONNX graph."""
