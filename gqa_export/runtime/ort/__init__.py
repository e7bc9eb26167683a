"""Bundles run by ONNX Runtime."""
