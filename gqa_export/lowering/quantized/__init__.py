"""Quantized weights in a lowered graph: products and lookups that read them, in the operators of a target."""
