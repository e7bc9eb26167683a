"""Numbers -> verdict: the cases, the bounds derived from PyTorch's own rounding, the judgement. Runs nothing itself."""
