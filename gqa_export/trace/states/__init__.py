"""Layers that keep a state of fixed size: linear attention, state-space layers and causal convolutions."""
