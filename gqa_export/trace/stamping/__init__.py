"""Depth for nothing: which layers are of one kind, and the layers that were not traced made from those that were."""
