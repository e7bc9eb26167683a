"""Where a bundle first goes wrong: the layer, the op, and what the pattern looks like. Runs on a CPU.

Every layer is fed PyTorch's own inputs (hidden states, cache), so that one wrong layer does not spoil the next.
"""
