"""Where other programs call gqa-export: pytest, NVIDIA Triton."""
