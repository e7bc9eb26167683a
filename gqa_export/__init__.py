"""gqa-export: grouped-query attention decoders from PyTorch to ONNX and TensorRT, proved right."""

__version__ = "0.1.0"
