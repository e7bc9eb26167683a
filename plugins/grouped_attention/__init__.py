"""Grouped-query attention over a KV cache: reference, kernels, plugin. Importing this imports nothing heavy."""
