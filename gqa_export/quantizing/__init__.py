"""Quantizing plain weights: which matrix gets how many bits, and the codes and scales with the smallest error."""
