"""Rotary embedding: found in the canonical graph, verified by evaluation, folded into the attention op."""
