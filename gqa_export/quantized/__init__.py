"""Quantized weights in one form, whatever wrote them and whatever will run them."""
