"""Kernels and plugins: the grouped-attention op where it runs."""
