"""What this machine and this Python have: processor, memory, GPUs, packages, TensorRT's libraries."""
